"""With `compute.micro_batches`, a run ends in the same bits on any number of ranks.

Not covered: GPUs; processors that compute differently.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from switokd.config.run_file import load
from switokd.errors import UsageError
from switokd.runtime.placement import Placement
from switokd.training.micro_batches import MeanBuffers
from tests.preloaded import train
from tests.training.test_resume import assert_equal_runs, keep_until

# Seven steps an epoch. 30 images make micro-batches of 7 and 8; the last batch has 5, so that some
# micro-batches are empty.
SMALL = ["data.train_samples=185", "data.drop_last=false", "data.batch_size=30"]
SMALL += ["schedule.epochs=2", "checkpoint.every_steps=5", "checkpoint.keep=100"]
SMALL += ["compute.micro_batches=4", "networks.teacher.model=wrn-10-1"]
SMALL += ["networks.student.model=own:Net"]
OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, num_classes)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        x = torch.relu(self.norm(self.convolution(x)))
        return self.last(self.dropout(x.mean(dim=(2, 3)))) * (1 + 0.01 * self.seen)
"""
SMALL += ["networks.teacher.clip_norm=1.0", "schedule.accumulate=3", "schedule.ema_decay=0.9"]
REPLICATED = "placement=replicated"
SPREAD = [f"networks.{name}.ranks=2" for name in ("teacher", "student")]
PLACEMENTS = {
    "replicated-2": (2, [REPLICATED]),
    "replicated-4": (4, [REPLICATED]),
    "dedicated": (2, []),
    "dedicated-2-each": (4, SPREAD),
    "table": (2, ["placement={teacher: [0, 1], student: [1]}"]),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "own.py").write_text(OWN)
    return train(folder, 1, "digits-1t1s", *SMALL, REPLICATED)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_same_bits_on_any_number_of_ranks(placement: str, alone: Path, tmp_path: Path) -> None:
    processes, more = PLACEMENTS[placement]
    (tmp_path / "own.py").write_text(OWN)
    assert_equal_runs(alone, train(tmp_path, processes, "digits-1t1s", *SMALL, *more))


def test_a_run_moves_between_numbers_of_ranks(alone: Path, tmp_path: Path) -> None:
    """One process to step 5, four to step 10, two to the end; 5 is inside a window of 3 steps."""
    (tmp_path / "own.py").write_text(OWN)
    shutil.copytree(alone, tmp_path / "out")
    keep_until(tmp_path / "out", 5)
    train(tmp_path, 4, "digits-1t1s", *SMALL, *SPREAD, "resume=auto")
    keep_until(tmp_path / "out", 10)
    moved = train(tmp_path, 2, "digits-1t1s", *SMALL, REPLICATED, "resume=auto")
    assert_equal_runs(alone, moved)


class Counting(nn.Module):
    """Adds up its input in a buffer; the other buffer never changes."""

    sum: torch.Tensor
    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.tensor([0.1, float("-inf")]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sum += x.sum()
        self.calls += 1
        return x


def test_buffers_move_by_the_mean_of_the_micro_batches() -> None:
    model = Counting()
    mask = model.get_buffer("mask")
    buffers = MeanBuffers("net", model)
    for step in (1, 2):
        buffers.begin()
        for i, share in enumerate((0.5, 0.25, 0.25, 0.0)):
            with buffers.copied(share, is_first=i == 0):
                if share:
                    model(torch.full((), i + 1.0))
        buffers.finish()
        assert model.get_buffer("sum").item() == step * (0.5 * 1 + 0.25 * 2 + 0.25 * 3)
        assert model.get_buffer("calls").item() == step
        assert model.get_buffer("mask") is mask
        assert torch.equal(mask, torch.tensor([0.1, float("-inf")]))


def test_the_boundaries_of_micro_batches_depend_on_their_number_alone() -> None:
    for n in (5, 29, 30, 64):
        cuts = []
        for ranks in (1, 2, 4):
            placement = Placement.of({"net": range(ranks)})
            placement = replace(placement, micro_batches=4)
            cuts.append([part for rank in range(ranks) for part in placement.parts("net", rank, n)])
            for rank, shard in placement.shards("net", n).items():
                own = placement.parts("net", rank, n)
                assert (shard.start, shard.stop) == (own[0].start, own[-1].stop)
        assert cuts[0] == cuts[1] == cuts[2]
        assert sum(part.stop - part.start for part in cuts[0]) == n


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["compute.micro_batches=3"],
            "compute.micro_batches: found 3; allowed: 1, 2, 4, 8 and so on",
        ),
        (["compute.micro_batches=2", "placement=auto"], "for a placement that you choose"),
        (["compute.micro_batches=2", "compute.batch_norm=sync"], "use batch_norm=rank"),
        (["compute.micro_batches=2", "compute.cuda_graphs=true"], "cuda_graphs=false"),
        (
            ["compute.micro_batches=4", "networks.teacher.ranks=3"],
            "teacher (ranks 0-2) cannot share 4 evenly; use 1, 2 or 4 ranks of equal weight",
        ),
        (
            ["compute.micro_batches=4", "placement={teacher: {0: 2, 1: 1}, student: [0]}"],
            "teacher (ranks 0-1) cannot share 4 evenly",
        ),
        (["compute.micro_batches=64"], "64 images leave one of 64 micro-batches fewer than 2"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(settings: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load("digits-1t1s", settings).check_batch(1)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
