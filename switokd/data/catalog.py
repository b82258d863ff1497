"""What is known of the data sets with a name, so that nothing has to be opened to plan or check.

Torch-free. Not covered: opening them (`data/sources.py`); data sets by import string and
image-folder, of which nothing is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

from switokd.config.sections import Data

Shape = tuple[int, int, int]
"""Channels, height, width."""


@dataclass(frozen=True)
class KnownData:
    """A data set that need not be here."""

    image: Shape
    classes: int
    samples: int
    """Training images."""
    folders: tuple[str, ...] = ()
    """What data.root must hold."""


KNOWN = {
    "digits": KnownData((1, 8, 8), 10, 1_437),
    "fashion-mnist": KnownData((1, 28, 28), 10, 60_000, ("FashionMNIST/raw",)),
    "cifar10": KnownData((3, 32, 32), 10, 50_000, ("cifar-10-batches-py",)),
    "cifar100": KnownData((3, 32, 32), 100, 50_000, ("cifar-100-python",)),
    "tiny-imagenet": KnownData((3, 64, 64), 200, 100_000, ("tiny-imagenet-200",)),
}
DOWNLOADABLE = ("fashion-mnist", "cifar10", "cifar100")
"""What data.download=true fetches."""


def known(data: Data) -> KnownData | None:
    """What is known of the data set of a run file; None if it has to be opened."""
    if data.dataset == "imagenet":
        shape = (3, data.image_size, data.image_size)
        return KnownData(shape, 1_000, 1_281_167, ("train", "val"))
    return KNOWN.get(data.dataset)
