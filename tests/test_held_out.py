"""Images held out for a strategy: nobody trains on them, and every rank is told the same."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from switokd.data import Images, open_images
from switokd.data.augment import mix
from switokd.data.sources import ArraySource
from switokd.errors import UsageError
from switokd.sections import Data
from tests.support import lines, train

# kdcl-general that keeps what it is told, and what it makes of that.
MODULE = """
import json, os
from switokd.strategies.kdcl import General

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
    "distillation.strategy_kwargs={held_out: 100}",
    "data.batch_size=64",
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
        expected = plain._view(train=True).batch([(0, i) for i in y.tolist()])
        assert torch.equal(x, expected[0])


@pytest.mark.parametrize(
    ("held_out", "sentence"),
    [
        (1436, "it holds out 1436 images, which must leave 2 or more of the 1437 training images"),
        (5000, "it holds out 5000 images, which must leave"),
        (-1, "it holds out -1 images"),
        (1400, "100 is more than the 37 training images that the strategy's 1400 held out leave"),
    ],
)
def test_holding_out_too_many_is_one_line(held_out: int, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        digits(held_out)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_and_one_process_are_told_the_same_and_train_the_same(tmp_path: Path) -> None:
    (tmp_path / "recorder.py").write_text(MODULE)
    layouts = {
        "apart": (2, []),
        "alone": (1, ["placement=replicated", "coordinator=off"]),
        "shards": (2, ["placement=replicated", "schedule.max_steps=2"]),
    }
    folders = {}
    for name, (processes, settings) in layouts.items():
        (tmp_path / name).mkdir()
        folders[name] = train(
            tmp_path / name, processes, *SETTINGS, *settings, PYTHONPATH=str(tmp_path)
        )
    told = {
        name: [lines(tmp_path / name / f"told-{rank}.jsonl") for rank in range(processes)]
        for name, (processes, _) in layouts.items()
    }

    ((first, second),) = told["alone"]
    images = open_images(Data(batch_size=64), 0, held_out=100)
    labels = [y for _, y in images.held_out_batches(lambda n: slice(0, n))]
    assert first["y"] == second["y"] == torch.cat(labels).tolist()
    assert first["names"] == ["teacher", "student"]
    assert sum(first["weights"]) == pytest.approx(1)
    assert first["weights"] != pytest.approx(second["weights"], abs=1e-3)

    for ranks in (told["apart"], told["shards"]):
        assert ranks[0] == ranks[1]
    for one, other in zip(told["apart"][0], told["alone"][0], strict=True):
        assert one["y"] == other["y"]
        assert one["weights"] == pytest.approx(other["weights"], rel=1e-6)
    assert told["shards"][0][0]["weights"] == pytest.approx(first["weights"], rel=1e-4)

    decisions = [lines(folders[name] / "decisions.jsonl") for name in ("apart", "alone")]
    assert len(decisions[0]) == 40  # 1337 images, 20 batches of 64 in each epoch
    for one, other in zip(*decisions, strict=True):
        assert one == other
    for name in ("teacher", "student"):
        apart, alone = (
            torch.load(folders[layout] / "weights" / f"{name}.pt", weights_only=True)
            for layout in ("apart", "alone")
        )
        assert all(torch.allclose(apart[key], alone[key], rtol=1e-5) for key in apart)
    summary = json.loads((folders["apart"] / "summary.json").read_text())
    assert summary["networks"]["student"]["steps"] == 40
