"""Shapes and sizes of the data sets with a name, for planning and checks without the files.

Torch-free. Not covered: opening data sets (`named.py`); image-folder and data sets by import
string, whose sizes are known only after opening.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from switokd.config.data_section import Data
from switokd.errors import UsageError

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


CLASS_FOLDERS = "train/CLASS/... and val/CLASS/..."
IN_ROOT = {
    "image-folder": CLASS_FOLDERS,
    "imagenet": CLASS_FOLDERS,
    "webdataset": ".tar shards in train/ and val/",
}
"""What data.root itself must hold, by data set."""


def known(data: Data) -> KnownData | None:
    """Return shape and size of a run file's data set; None if only opening it tells them."""
    if data.dataset == "imagenet":
        shape = (3, data.side, data.side)
        return KnownData(shape, 1_000, 1_281_167, ("train", "val"))
    return KNOWN.get(data.dataset)


def missing_folders(data: Data) -> list[Path]:
    """Return the folders that a data set with a name needs, and that are not there.

    data.root may be the folder itself.
    """
    catalogued, root = known(data), Path(data.root)
    folders = catalogued.folders if catalogued else ()
    paths = [root if root.resolve().name == name else root / name for name in folders]
    return [path for path in paths if not os.path.isdir(path)]


def check_present(data: Data) -> None:
    """UsageError if a data set with a name is surely missing, without a look at its files.

    Takes no time, unlike opening the data set, which says more about a folder that is there.
    """
    root = Path(data.root).resolve()
    if data.dataset in IN_ROOT:
        if not os.path.isdir(root):
            raise UsageError(
                f"data.root: there is no folder {root}; name one that holds {IN_ROOT[data.dataset]}"
            )
    elif not data.download and (missing := missing_folders(data)):
        remedy = ", or set data.download=true" if data.dataset in DOWNLOADABLE else ""
        raise UsageError(
            f"data.root: {data.dataset} is not in {root}: there is no folder {missing[0]}; put it "
            f"there{remedy}"
        )
