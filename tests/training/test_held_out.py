"""Images held out for a strategy: nobody trains on them, and every rank is told the same."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from switokd.config.sections import Data
from switokd.data.augment import mix
from switokd.data.images import Images, open_images
from switokd.data.sources import ArraySource
from switokd.errors import UsageError
from tests.support import lines, train

# kdcl-general that keeps what it is told, and what it makes of that.
MODULE = """
import json, os
from switokd.distillation.strategies.kdcl import General

class Recorder(General):
    def observe(self, logits, y):
        super().observe(logits, y)
        told = {"y": y.tolist(), "names": list(logits), "weights": self.weights.tolist()}
        with open(f"told-{os.environ.get('RANK', '0')}.jsonl", "a") as file:
            file.write(json.dumps(told) + "\\n")
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
    """Digits whose label is their index."""
    images = open_images(Data(**{"batch_size": 100, **settings}), seed, held_out)
    labels = torch.arange(1437)
    pixels = images.sources.train.fetch(labels.tolist(), mix(labels.numpy()))[0]
    object.__setattr__(images.sources, "train", ArraySource(pixels, labels))
    object.__setattr__(images.sources, "classes", 1437)
    return images


def of_held_out(images: Images) -> list[int]:
    batches = images.held_out_batches(lambda n: slice(0, n))
    return torch.cat([y for _, y in batches]).tolist()


def test_the_training_stream_leaves_them_out() -> None:
    images = digits(held_out=150)
    assert (images.samples, images.steps_per_epoch) == (1287, 12)
    held_out = set(of_held_out(images))
    assert len(held_out) == 150
    seen = [y.tolist() for _, y in images.stream(36)]
    assert not held_out & set(chain(*seen))
    assert len(set(chain(*seen[:12]))) == 1200
    whole = digits(held_out=150, drop_last=False)
    assert {i for _, y in whole.stream(13) for i in y.tolist()} == set(range(1437)) - held_out


def test_nor_do_they_come_in_as_anothers_partner() -> None:
    images = digits(held_out=700, mixup=1.0)
    seen = {i for _, y in images.stream(14) for i in y.nonzero()[:, 1].tolist()}
    assert len(seen) > 700
    assert not seen & set(of_held_out(images))


def test_they_depend_on_the_seed_alone() -> None:
    one, other = (set(of_held_out(digits(150, seed))) for seed in (0, 1))
    assert one == set(of_held_out(digits(150, batch_size=32, workers=1)))
    assert len(one & other) < 50
    assert one != set(range(150))


def test_they_are_not_augmented_and_their_parts_make_up_the_whole() -> None:
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
def test_holding_out_too_many_is_one_line(held_out: int, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        digits(held_out)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


Told = list[list[dict[str, Any]]]
"""By rank, what its strategy was told before each epoch."""


def observed(folder: Path, processes: int, *settings: str) -> tuple[Path, Told]:
    """Train in `folder`; its run folder, and what every rank was told."""
    (folder / "recorder.py").write_text(MODULE)
    out = train(folder, processes, *SETTINGS, *settings, PYTHONPATH=str(folder))
    return out, [lines(folder / f"told-{rank}.jsonl") for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    return observed(folder, 1, "placement=replicated", "coordinator=off")


def test_the_strategy_is_told_before_each_epoch(alone: tuple[Path, Told]) -> None:
    ((first, second),) = alone[1]
    images = open_images(Data(batch_size=128), 0, held_out=150)
    labels = [y for _, y in images.held_out_batches(lambda n: slice(0, n))]
    assert first["y"] == second["y"] == torch.cat(labels).tolist()
    assert first["names"] == ["teacher", "student"]
    assert sum(first["weights"]) == pytest.approx(1)
    assert first["weights"] != pytest.approx(second["weights"], abs=1e-3)


def test_a_rank_for_each_network_trains_as_one_process(
    alone: tuple[Path, Told], tmp_path: Path
) -> None:
    folder, told = observed(tmp_path, 2)
    assert told[0] == told[1]
    for mine, theirs in zip(told[0], alone[1][0], strict=True):
        assert mine["y"] == theirs["y"]
        assert mine["weights"] == pytest.approx(theirs["weights"], rel=1e-6)
    decisions = [lines(out / "decisions.jsonl") for out in (folder, alone[0])]
    assert len(decisions[0]) == 20  # 1287 images, 10 batches of 128 in each epoch
    assert decisions[0] == decisions[1]
    for name in ("teacher", "student"):
        mine, theirs = (
            torch.load(out / "weights" / f"{name}.pt", weights_only=True)
            for out in (folder, alone[0])
        )
        assert all(torch.allclose(mine[key], theirs[key], rtol=1e-5) for key in theirs)


def test_shards_of_the_images_held_out_come_together(
    alone: tuple[Path, Told], tmp_path: Path
) -> None:
    _, told = observed(tmp_path, 2, "placement=replicated", "schedule.max_steps=1")
    ((mine,), others) = told
    theirs = alone[1][0][0]
    assert [mine] == others
    assert mine["y"] == theirs["y"]
    assert mine["weights"] == pytest.approx(theirs["weights"], rel=1e-4)
