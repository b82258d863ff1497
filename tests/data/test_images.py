"""Images: the same pixels in the same order on every rank, and one-line errors for invalid data.

Not covered: downloads.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from switokd.config.data_section import Data
from switokd.data.augment import crop_and_flip, mix, mix_one
from switokd.data.images import Images, View, open_images
from switokd.data.loader import Batch
from switokd.data.sources import ArraySource
from switokd.errors import OwnCodeError, UsageError

# The DataLoader warns on machines with fewer processors than loader processes.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

MODULE = '''\
import random

import numpy as np
import torch


class Noise:
    """Draws from the default generators of Python, numpy and PyTorch."""

    def __init__(self, train, classes=4, side=8):
        self.classes = list(range(classes))
        self.shape = (2, side, side)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        image = torch.rand(self.shape) + np.random.rand() + random.random()
        return image, index % len(self.classes)


class Wrong(Noise):
    """Sample 3 is invalid."""

    def __init__(self, train, defect):
        super().__init__(train)
        self.defect = defect

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        if index == 3:
            if self.defect == "label":
                label = 4
            if self.defect == "negative":
                label = -1
            if self.defect == "shape":
                image = image[:, :4]
            if self.defect == "dimensions":
                image = image[0, 0]
            if self.defect == "type":
                image = image.mul(255).byte()
            if self.defect == "file":
                open("nowhere.npy")
        return image, label


class Bytes:
    """Grey images as arrays, without a list of classes."""

    def __init__(self, train):
        self.items = [(np.full((8, 8), 51 * i, np.uint8), i % 3) for i in range(6)]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.items[index]


def nothing(train):
    return None
'''

Open = Callable[..., Images]


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return a function that opens a data set of a user's module."""
    (tmp_path / "own_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def open_own(name: str, kwargs: dict[str, Any] | None = None, **settings: Any) -> Images:
        settings = {"batch_size": 8, **settings}
        return open_images(Data(dataset=f"own_data:{name}", kwargs=kwargs or {}, **settings), 0)

    return open_own


def digits(seed: int = 0, **settings: Any) -> Images:
    return open_images(Data(dataset="digits", **{"batch_size": 100, **settings}), seed)


def equal(one: Iterable[Batch], other: Iterable[Batch]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_digits_are_scikit_learns() -> None:
    images, expected = digits(), load_digits()
    parts = (images.sources.train, images.sources.test)
    pixels = torch.cat([part.images for part in parts if isinstance(part, ArraySource)])
    labels = torch.cat([part.labels for part in parts if isinstance(part, ArraySource)])
    assert torch.equal(labels, torch.from_numpy(expected.target))
    spread = torch.from_numpy(expected.images)[:, None] * 255 / 16
    assert pixels.shape == spread.shape
    assert (pixels - spread).abs().max() <= 0.5


def test_digits() -> None:
    images = digits()
    assert (images.shape, images.classes) == ((1, 8, 8), 10)
    assert (images.samples, len(images.sources.test)) == (1437, 360)
    pixels, labels = next(images.stream(1))
    assert (pixels.dtype, pixels.shape) == (torch.float32, (100, 1, 8, 8))
    assert (labels.dtype, labels.shape) == (torch.int64, (100,))
    everything = torch.cat([x for x, _ in digits(crop_padding=0).stream(14)])
    assert everything.mean().item() == pytest.approx(0, abs=0.02)
    assert everything.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dataset", ["digits", "own_data:Noise"])
def test_batches_do_not_depend_on_loader_processes(own_data: Open, dataset: str) -> None:
    alone, helped = (
        open_images(Data(dataset=dataset, batch_size=8, workers=workers, flip=True), seed=3)
        for workers in (0, 2)
    )
    batches = list(alone.stream(7, first=2))
    assert len(batches) == 5
    assert equal(batches, helped.stream(7, first=2))


def test_loader_processes_are_not_forked_from_the_rank() -> None:
    loader = digits(workers=1).test().loader
    assert loader.multiprocessing_context.get_start_method() == "forkserver"


def test_random_transforms_differ_by_sample_epoch_and_seed(own_data: Open) -> None:
    one = pictures(own_data("Noise").stream(3))
    assert len(one) == 24
    assert one != pictures(islice(own_data("Noise").stream(6), 3, None))
    other = open_images(Data(dataset="own_data:Noise", batch_size=8), 1)
    assert not one & pictures(other.stream(3))


def pictures(batches: Iterator[Batch]) -> set[bytes]:
    return {pixels.numpy().tobytes() for x, _ in batches for pixels in x}


def test_random_transforms_do_not_change_the_generators(own_data: Open) -> None:
    def draw() -> tuple[float, ...]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    seed()
    expected = draw()
    stream = own_data("Noise").stream(3)
    seed()
    assert len(list(stream)) == 3
    assert draw() == expected


def indexed(samples: int, batch_size: int, **settings: Any) -> Images:
    """Return images whose label is their index."""
    images = digits(batch_size=batch_size, **settings)
    labels = torch.arange(samples)
    source = ArraySource(
        images.sources.train.fetch(labels.tolist(), mix(labels.numpy()))[0], labels
    )
    object.__setattr__(images.sources, "train", source)
    return images


@pytest.mark.parametrize("drop_last", [True, False])
def test_each_epoch_is_another_permutation(drop_last: bool) -> None:
    images = indexed(100, 24, drop_last=drop_last)
    steps = 4 if drop_last else 5
    assert images.steps_per_epoch == steps
    labels = [y.tolist() for _, y in images.stream(3 * steps)]
    epochs = [list(chain(*labels[e * steps : (e + 1) * steps])) for e in range(3)]
    for indices in epochs:
        assert len(indices) == len(set(indices)) == (96 if drop_last else 100)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("first", [0, 1, 4, 6, 11])
def test_stream_can_start_anywhere(first: int) -> None:
    images = indexed(100, 24, flip=True)
    assert equal(list(images.stream(12))[first:], images.stream(12, first=first))


@pytest.mark.parametrize(
    ("samples", "batch_size", "drop_last", "steps"),
    [(10, 4, True, 2), (10, 4, False, 3), (9, 4, False, 2), (8, 4, False, 2), (3, 4, False, 1)],
)
def test_last_batch_is_never_a_single_sample(
    samples: int, batch_size: int, drop_last: bool, steps: int
) -> None:
    images = indexed(samples, batch_size, drop_last=drop_last)
    assert images.steps_per_epoch == steps
    assert all(len(y) > 1 for _, y in images.stream(3 * steps))


def test_pixels_depend_on_sample_and_epoch_not_on_the_batch() -> None:
    images = digits()
    view = View(images.sources.train, images.sources, seed=0, crop_padding=2, flip=True)
    positions = [(epoch, index) for epoch in (0, 1) for index in range(50)]
    together, labels = view.batch(positions)
    backwards, labels_backwards = view.batch(positions[::-1])
    assert torch.equal(together, backwards.flip(0))
    assert torch.equal(labels, labels_backwards.flip(0))
    assert torch.equal(view[1, 7][0][0], together[57])
    same = [torch.equal(a, b) for a, b in zip(together[:50], together[50:], strict=True)]
    assert sum(same) < 10  # 50 possible augmentations: about 1 of 50 is equal


def test_test_set_is_whole_in_order_and_not_augmented() -> None:
    images = digits(crop_padding=3, flip=True)
    test = images.test(128)
    x, y = (torch.cat(part) for part in zip(*test, strict=True))
    whole = images.sources.test.fetch(range(360), mix(np.arange(360)))
    assert torch.equal(y, whole[1])
    assert torch.allclose(x, (whole[0] / 255 - 0.306) / 0.377, atol=1e-6)
    assert equal(list(test), list(test))


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (2, False), (3, True)])
def test_crop_and_flip_equals_a_loop_over_pixels(padding: int, flip: bool) -> None:
    x = torch.arange(1, 1 + 40 * 3 * 5 * 7, dtype=torch.int32).reshape(40, 3, 5, 7)
    keys = mix(np.arange(40))
    expected = [
        crop_and_flip_by_loop(image, key, padding, flip) for image, key in zip(x, keys, strict=True)
    ]
    assert torch.equal(crop_and_flip(x, keys, padding, flip), torch.stack(expected))


def crop_and_flip_by_loop(image: Tensor, key: np.uint64, padding: int, flip: bool) -> Tensor:
    def draw(stream: int, high: int) -> int:
        return splitmix(int(key), stream) % high

    top, left = draw(1, 2 * padding + 1) - padding, draw(2, 2 * padding + 1) - padding
    out = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row + top < height and 0 <= column + left < width:
                out[:, row, column] = image[:, row + top, column + left]
    return out.flip(2) if flip and draw(3, 2) else out


def splitmix(*parts: int) -> int:
    """Compute the hash with Python's unbounded integers."""
    h, mask = 0, 2**64 - 1
    for part in parts:
        h = ((h ^ part) + 0x9E3779B97F4A7C15) & mask
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        h ^= h >> 31
    return h


def test_hash_is_splitmix64() -> None:
    assert int(mix(0)) == 0xE220A8397B1DCDAF  # the generator's published first output
    hashes = mix(7, np.array([0, 1, 2**62]), 3)
    assert hashes.tolist() == [splitmix(7, part, 3) for part in (0, 1, 2**62)]
    assert [mix_one(7, part, 3) for part in (0, 1, 2**62)] == hashes.tolist()
    assert mix_one(-1, 5) == int(mix(np.int64(-1), 5))


def test_bytes_of_own_data_are_scaled_and_classes_counted(own_data: Open) -> None:
    images = own_data("Bytes", batch_size=6)
    assert (images.shape, images.classes) == ((1, 8, 8), 3)
    (pixels, _), *rest = images.test()
    assert not rest
    assert pixels[:, 0, 0, 0].tolist() == pytest.approx([-1, -0.6, -0.2, 0.2, 0.6, 1], abs=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        ("label", "own_data:Wrong, training sample 3: label 4 is outside the 4 classes (0 to 3)"),
        ("negative", "sample 3: label -1 is outside the 4 classes"),
        (
            "shape",
            "training set: images of one batch differ: float32 [2, 4, 8], float32 [2, 8, 8]; ",
        ),
        ("type", "images of one batch differ: float32 [2, 8, 8], uint8 [2, 8, 8]; make them"),
        ("dimensions", "sample 3: an image must be [channels, height, width], got [8]"),
    ],
)
def test_message_for_an_invalid_sample(
    own_data: Open, defect: str, sentence: str, workers: int
) -> None:
    with pytest.raises(UsageError) as caught:
        list(own_data("Wrong", {"defect": defect}, workers=workers).stream(3))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_message_for_a_missing_file_of_own_data(own_data: Open) -> None:
    with pytest.raises(OwnCodeError) as caught:
        list(own_data("Wrong", {"defect": "file"}).stream(3))
    where = r"own_data\.py:\d+ in __getitem__ \(data.dataset own_data:Wrong, training sample 3\)"
    assert re.search(rf"{where}: FileNotFoundError: \[Errno 2\]", str(caught.value))


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        ({"dataset": "fashion-mnist"}, ["FashionMNIST is not in", "FashionMNIST/raw/train-images"]),
        ({"dataset": "cifar10"}, ["CIFAR10 is not in", "cifar-10-batches-py/"]),
        (
            {"dataset": "cifar100"},
            ["CIFAR100 is not in", "cifar-100-python/", "data.download=true"],
        ),
        ({"dataset": "image-folder"}, ["must hold train/CLASS/... and val/CLASS/..."]),
        (
            {"dataset": "no_such:thing"},
            ["data.dataset no_such:thing: there is no module 'no_such'"],
        ),
        (
            {"dataset": "own_data:nothing"},
            ["must be a data set with a length and items, got NoneType"],
        ),
        ({"dataset": "own_data:Noise", "kwargs": {"a": 1}}, ["unexpected keyword argument 'a'"]),
        ({"batch_size": 1438}, ["data.batch_size: 1438 is more than the 1437 training images"]),
    ],
)
def test_message_for_unusable_data_is_one_line(
    own_data: Open, tmp_path: Path, settings: dict[str, Any], sentences: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        open_images(Data(**{"root": str(tmp_path), "batch_size": 8, **settings}), seed=0)
    message = str(caught.value)
    assert "\n" not in message
    for sentence in sentences:
        assert sentence in message
    if settings.get("dataset") in ("fashion-mnist", "cifar10", "cifar100", "image-folder"):
        assert str(tmp_path) in message


def test_fashion_mnist_from_debians_package(tmp_path: Path) -> None:
    package = Path("/usr/share/datasets/fashion-mnist")
    if not (parts := sorted(package.glob("*.gz"))):
        missing = f"{package} is not there (Debian package dataset-fashion-mnist)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    (raw := tmp_path / "FashionMNIST/raw").mkdir(parents=True)
    for part in parts:
        with gzip.open(part) as packed, (raw / part.stem).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    images = open_images(Data(dataset="fashion-mnist", root=str(tmp_path)), seed=0)
    assert (images.shape, images.classes) == ((1, 28, 28), 10)
    assert (images.samples, len(images.sources.test)) == (60_000, 10_000)
    _, labels = images.sources.train.fetch(range(60_000), mix(np.zeros(1, np.int64)))
    assert labels.bincount().tolist() == [6_000] * 10
    x, _ = next(images.stream(1))
    assert abs(x.mean().item()) < 0.3


def test_a_crop_beyond_the_image_is_refused() -> None:
    assert digits(crop_padding=8).samples
    with pytest.raises(UsageError, match=r"crop_padding: 9 is more than the 8 pixels of an image"):
        digits(crop_padding=9)
