"""Images held out for a strategy: no network trains on them; all ranks observe the same logits."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from switokd.config.data_section import Data
from switokd.data.augment import mix
from switokd.data.images import Images, open_images
from switokd.data.sources import ArraySource
from switokd.errors import UsageError
from tests.preloaded import train
from tests.support import lines

# kdcl-general that also writes what it observes and its weights to a file.
MODULE = """
import json, os
from switokd.distillation.strategies.kdcl import General

class Recorder(General):
    def observe(self, logits, y):
        super().observe(logits, y)
        line = {"y": y.tolist(), "names": list(logits), "weights": self.weights.tolist()}
        with open(f"observed-{os.environ.get('RANK', '0')}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")
"""
SETTINGS = [
    "digits-1t1s",
    "distillation.strategy=recorder:Recorder",
    "distillation.strategy_kwargs={held_out: 150}",
    "networks.teacher.model=wrn-10-1",
    "data.batch_size=128",
    "data.label_smoothing=0.1",
    "schedule.epochs=2",
]


def digits(held_out: int, seed: int = 0, **settings: Any) -> Images:
    """Return the digits, with each image's index as its label."""
    images = open_images(Data(**{"batch_size": 100, **settings}), seed, held_out)
    labels = torch.arange(1437)
    pixels = images.sources.train.fetch(labels.tolist(), mix(labels.numpy()))[0]
    sources = replace(images.sources, train=ArraySource(pixels, labels), classes=1437)
    return replace(images, sources=sources)


def of_held_out(images: Images) -> list[int]:
    batches = images.held_out_batches(lambda n: slice(0, n))
    return torch.cat([y for _, y in batches]).tolist()


def test_training_batches_exclude_held_out_images() -> None:
    images = digits(held_out=150)
    assert (images.samples, images.steps_per_epoch) == (1287, 12)
    held_out = set(of_held_out(images))
    assert len(held_out) == 150
    seen = [y.tolist() for _, y in images.stream(36)]
    assert not held_out & set(chain(*seen))
    assert len(set(chain(*seen[:12]))) == 1200
    whole = digits(held_out=150, drop_last=False)
    assert {i for _, y in whole.stream(13) for i in y.tolist()} == set(range(1437)) - held_out


def test_mixup_does_not_use_held_out_images() -> None:
    images = digits(held_out=700, mixup=1.0)
    seen = {i for _, y in images.stream(14) for i in y.nonzero()[:, 1].tolist()}
    assert len(seen) > 700
    assert not seen & set(of_held_out(images))


def test_held_out_images_depend_only_on_the_seed() -> None:
    one, other = (set(of_held_out(digits(150, seed))) for seed in (0, 1))
    assert one == set(of_held_out(digits(150, batch_size=32, workers=1)))
    assert len(one & other) < 50
    assert one != set(range(150))


def test_held_out_images_are_not_augmented_and_their_parts_are_complete() -> None:
    images = digits(held_out=130, crop_padding=3, flip=True, mixup=1.0)
    whole = list(images.held_out_batches(lambda n: slice(0, n)))
    assert [len(y) for _, y in whole] == [100, 30]
    halves = [
        images.held_out_batches(lambda n: slice(0, n // 3)),
        images.held_out_batches(lambda n: slice(n // 3, n)),
    ]
    plain = digits(held_out=0, crop_padding=0, flip=False)
    for (x, y), *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
        expected = plain.view(train=True).batch([(0, i) for i in y.tolist()])
        assert torch.equal(x, expected[0])


@pytest.mark.parametrize(
    ("held_out", "sentence"),
    [
        (1436, "it holds out 1436 of the 1437 training images, and at least 2 must remain"),
        (5000, "it holds out 5000 of the 1437 training images"),
        (-1, "it holds out -1 of the 1437"),
        (1400, "100 is more than the 37 training images (the strategy holds out 1400)"),
    ],
)
def test_holding_out_too_many_images_is_a_usage_error(held_out: int, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        digits(held_out)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


Observed = list[list[dict[str, Any]]]
"""By rank: what its strategy observed before each epoch."""


def observed(folder: Path, processes: int, *settings: str) -> tuple[Path, Observed]:
    """Train in `folder`; return the run folder, and what every rank observed."""
    (folder / "recorder.py").write_text(MODULE)
    out = train(folder, processes, *SETTINGS, *settings, PYTHONPATH=str(folder))
    return out, [lines(folder / f"observed-{rank}.jsonl") for rank in range(processes)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Observed]:
    """Train in one process."""
    folder = tmp_path_factory.mktemp("one_process")
    return observed(folder, 1, "placement=replicated", "coordinator=off")


def test_the_strategy_observes_logits_before_each_epoch(one_process: tuple[Path, Observed]) -> None:
    ((first, second),) = one_process[1]
    images = open_images(Data(batch_size=128), 0, held_out=150)
    labels = [y for _, y in images.held_out_batches(lambda n: slice(0, n))]
    assert first["y"] == second["y"] == torch.cat(labels).tolist()
    assert first["names"] == ["teacher", "student"]
    assert sum(first["weights"]) == pytest.approx(1)
    assert first["weights"] != pytest.approx(second["weights"], abs=1e-3)


def test_one_rank_per_network_trains_like_one_process(
    one_process: tuple[Path, Observed], tmp_path: Path
) -> None:
    folder, lines_by_rank = observed(tmp_path, 2)
    assert lines_by_rank[0] == lines_by_rank[1]
    for ours, theirs in zip(lines_by_rank[0], one_process[1][0], strict=True):
        assert ours["y"] == theirs["y"]
        assert ours["weights"] == pytest.approx(theirs["weights"], rel=1e-6)
    decisions = [lines(out / "decisions.jsonl") for out in (folder, one_process[0])]
    assert len(decisions[0]) == 20  # 1287 images, 10 batches of 128 in each epoch
    assert decisions[0] == decisions[1]
    for name in ("teacher", "student"):
        ours, theirs = (
            torch.load(out / "weights" / f"{name}.pt", weights_only=True)
            for out in (folder, one_process[0])
        )
        assert all(torch.allclose(ours[key], theirs[key], rtol=1e-5) for key in theirs)


def test_shards_of_held_out_images_are_combined(
    one_process: tuple[Path, Observed], tmp_path: Path
) -> None:
    _, lines_by_rank = observed(tmp_path, 2, "placement=replicated", "schedule.max_steps=1")
    ((ours,), others) = lines_by_rank
    theirs = one_process[1][0][0]
    assert [ours] == others
    assert ours["y"] == theirs["y"]
    assert ours["weights"] == pytest.approx(theirs["weights"], rel=1e-4)
