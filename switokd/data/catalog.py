"""Shapes and sizes of the data sets with a name, for planning and checks without the files.

Torch-free. Not covered: opening data sets (`named.py`); image-folder and data sets by import
string, whose sizes are known only after opening.
"""

from __future__ import annotations

from dataclasses import dataclass

from switokd.config.sections import Data

Shape = tuple[int, int, int]
"""Channels, height, width."""


@dataclass(frozen=True)
class KnownData:
    """Shape and size of a data set whose files may be missing."""

    image: Shape
    classes: int
    samples: int
    """Number of training images."""
    folders: tuple[str, ...] = ()
    """Folders that data.root must contain."""


KNOWN = {
    "digits": KnownData((1, 8, 8), 10, 1_437),
    "fashion-mnist": KnownData((1, 28, 28), 10, 60_000, ("FashionMNIST/raw",)),
    "cifar10": KnownData((3, 32, 32), 10, 50_000, ("cifar-10-batches-py",)),
    "cifar100": KnownData((3, 32, 32), 100, 50_000, ("cifar-100-python",)),
    "tiny-imagenet": KnownData((3, 64, 64), 200, 100_000, ("tiny-imagenet-200",)),
}
DOWNLOADABLE = ("fashion-mnist", "cifar10", "cifar100")
"""Data sets that data.download=true can download."""


def known(data: Data) -> KnownData | None:
    """Return shape and size of a run file's data set; None if only opening it tells them."""
    if data.dataset == "imagenet":
        shape = (3, data.side, data.side)
        return KnownData(shape, 1_000, 1_281_167, ("train", "val"))
    return KNOWN.get(data.dataset)
