"""BatchNorm of a network on several ranks: its statistics, and the lines that a run prints.

Not covered: training with statistics over all ranks (`batch_norm: sync`), which needs several GPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore

from switokd.config.run_file import load
from switokd.models import registry
from switokd.runtime.environment import Environment
from switokd.runtime.placement import Placement
from switokd.runtime.process_group import World
from switokd.training.build import make_learner
from switokd.training.schedules import AccumulationWindow
from switokd.worker import describe
from tests.preloaded import train

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

# Saves its training inputs, and its statistics after the last test, when the process ends.
NET = """
import atexit
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(in_channels * 64)
        self.other = nn.InstanceNorm1d(in_channels, track_running_stats=True)
        self.linear = nn.Linear(in_channels * 64, num_classes)
        self.seen = []
        atexit.register(self.leave)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            self.seen.append(x.detach().clone())
        return self.linear(self.norm(x) + self.other(x[:, None]).flatten(1))

    def leave(self):
        statistics = {"mean": self.norm.running_mean, "var": self.norm.running_var}
        statistics |= {"other": self.other.running_mean, "seen": self.seen}
        torch.save(statistics, f"rank{os.environ['RANK']}.pt")
"""
STEPS = 3


def test_statistics_are_the_mean_over_ranks_weighted_by_their_shares(tmp_path: Path) -> None:
    """Train for three steps, with 48 images on rank 0 and 16 on rank 1."""
    (tmp_path / "net.py").write_text(NET)
    uneven = ["networks.teacher.model=net:Net", "placement={teacher: {0: 3, 1: 1}, student: [1]}"]
    folder = train(tmp_path, 2, "digits-1t1s", *uneven, f"schedule.max_steps={STEPS}")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert [[len(x) for x in rank["seen"]] for rank in ranks] == [[48] * STEPS, [16] * STEPS]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ("mean", "var"))

    own = [_statistics(rank["seen"]) for rank in ranks]
    assert (own[0] - own[1]).abs().max() > 0.05  # otherwise any weights would pass
    expected = (3 * own[0] + own[1]) / 4
    statistics = torch.stack((ranks[0]["mean"], ranks[0]["var"])).double()
    torch.testing.assert_close(statistics, expected, rtol=1e-5, atol=1e-6)
    others = [_running([x.double().mean() for x in rank["seen"]]) for rank in ranks]
    assert (others[0] - others[1]).abs() > 1e-3
    for rank in ranks:
        statistics = rank["other"].double().squeeze()
        torch.testing.assert_close(
            statistics, (3 * others[0] + others[1]) / 4, rtol=1e-5, atol=1e-6
        )
    saved = torch.load(folder / "weights" / "teacher.pt")
    assert torch.equal(saved["norm.running_mean"], ranks[0]["mean"])
    assert torch.equal(saved["norm.running_var"], ranks[0]["var"])


def _statistics(batches: list[torch.Tensor]) -> torch.Tensor:
    """Return running mean and variance `[2, F]` after these batches `[b, F]`, from 0 and 1."""
    mean, var = torch.zeros(64).double(), torch.ones(64).double()
    for x in batches:
        mean = 0.9 * mean + 0.1 * x.double().mean(dim=0)
        var = 0.9 * var + 0.1 * x.double().var(dim=0)
    return torch.stack((mean, var))


def _running(means: list[torch.Tensor]) -> torch.Tensor:
    """Return the running mean after batches with these means, from 0."""
    mean = torch.zeros(()).double()
    for batch_mean in means:
        mean = 0.9 * mean + 0.1 * batch_mean
    return mean


SHARED_GPU = "ranks share a GPU: exchanging over Gloo and the host's memory, not NCCL"


@pytest.mark.parametrize(
    ("device", "backend", "ranks", "setting", "expected"),
    [
        ("cpu", "gloo", [1], "rank", []),
        ("cpu", "gloo", [0, 1], "rank", ["BatchNorm statistics: over each rank"]),
        ("cuda", "nccl", [1], "sync", []),
        ("cuda", "nccl", [0, 1], "rank", ["BatchNorm statistics: over each rank"]),
        ("cuda", "nccl", [0, 1], "sync", ["BatchNorm statistics: over all of a network's ranks"]),
        ("cuda", "gloo", [1], "rank", [SHARED_GPU]),
        ("cuda", "gloo", [0, 1], "rank", [SHARED_GPU, "BatchNorm statistics: over each rank"]),
    ],
)
def test_a_run_describes_its_exchange_and_its_batch_norm(
    device: str, backend: str, ranks: list[int], setting: str, expected: list[str]
) -> None:
    table = f"placement={{teacher: [0], student: {ranks}}}"
    config = load("digits-1t1s", [table, f"compute.batch_norm={setting}"])
    placement = Placement.of({"teacher": [0], "student": ranks})
    world = World(Environment(world_size=2), torch.device(device), backend=backend)
    first, where, *more = describe(config, world, placement, "somewhere").splitlines()
    assert first == f"2 processes on {device}, somewhere"
    assert where == f"placement {placement}"
    assert more == expected


def test_sync_batch_norm_uses_the_networks_process_group() -> None:
    """Only the conversion is tested, because SyncBatchNorm needs GPUs to compute."""
    config = load("digits-1t1s", ["device=auto", "compute.batch_norm=sync"])
    store = HashStore()  # only this process uses it
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group, world = torch.distributed.group.WORLD, World(Environment(), torch.device("cpu"))
        for shared in (group, None):
            network = registry.build("wrn-10-1", 1, 10)
            before = {name: value.clone() for name, value in network.state_dict().items()}
            made = make_learner(
                config, "student", network, world, shared, AccumulationWindow()
            ).model
            norms = [m for m in made.modules() if isinstance(m, BATCH_NORMS)]
            assert len(norms) == 7
            kind = nn.SyncBatchNorm if shared else nn.BatchNorm2d
            assert all(type(norm) is kind for norm in norms)
            assert all(getattr(norm, "process_group", None) is shared for norm in norms)
            after = made.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(after[name], value) for name, value in before.items())
    finally:
        torch.distributed.destroy_process_group()
