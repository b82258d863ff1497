"""Tiny-ImageNet in its original folder layout, as downloaded and unpacked.

    tiny-imagenet-200/
      wnids.txt                       the 200 classes, one WordNet id per line
      train/n01443537/images/*.JPEG   500 images per class
      val/images/*.JPEG               all 10,000 in one folder
      val/val_annotations.txt         image, class and box, separated by tabs

A label is the position of the class among the sorted ids, as with torchvision's ImageFolder. Images
are decoded on demand, in `data.workers` processes: all 110,000 in memory would take 1.35 GB per
rank and half a minute before the first step. Greyscale images become RGB.

Not covered: test/, which has no labels; bounding boxes; downloading and unpacking.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from switokd.data import pictures
from switokd.data.image_files import entries
from switokd.errors import UsageError

FOLDER = "tiny-imagenet-200"
SIDE = 64
"""Height and width of an image in pixels."""
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""By channel, from the paper's released training script, which uses CIFAR-10's values here."""


@dataclass(frozen=True)
class TinyImageNet:
    """One part of the data set: image files with their labels."""

    root: Path
    files: tuple[str, ...]
    """Paths relative to root."""
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Return RGB bytes `[64, 64, 3]` and label; UsageError if the file is not such an image."""
        path = self.root / self.files[index]
        try:
            pixels = np.asarray(pictures.load(path, channels=3))
        except UsageError as error:
            raise UsageError(f"{error}; unpack the data again") from None
        if pixels.shape != (SIDE, SIDE, 3):
            height, width, _ = pixels.shape
            raise UsageError(
                f"{path}: an image of {width} x {height} pixels, where Tiny-ImageNet has {SIDE} x "
                f"{SIDE}; unpack the data again, or use data.dataset=image-folder for your own"
            )
        return pixels, self.labels[index]


def open_tiny_imagenet(data_root: str) -> tuple[TinyImageNet, TinyImageNet, list[str]]:
    """Return training images, validation images, and the classes' ids by label.

    data_root: the folder that holds tiny-imagenet-200/, or that folder itself. UsageError if a
    file or folder of the layout is missing.
    """
    root = Path(data_root)
    if os.path.isdir(root / FOLDER):
        root = root / FOLDER
    if not os.path.isfile(root / "wnids.txt"):
        raise UsageError(
            f"data.root: {root.resolve()} holds no {FOLDER}/ with wnids.txt, train/ and val/; "
            "unpack tiny-imagenet-200.zip there"
        )
    classes = sorted(_lines(root / "wnids.txt"))
    label_of = {name: label for label, name in enumerate(classes)}
    return _train(root, label_of), _val(root, label_of), classes


def _train(root: Path, label_of: dict[str, int]) -> TinyImageNet:
    """Return all images of train/CLASS/images, sorted by class and file name.

    label_of: label by class id, in the order of the labels.
    """
    files, labels = [], []
    for name, label in label_of.items():
        images = _images(root / "train" / name / "images")
        if not images:
            raise UsageError(
                f"{root.resolve()}: class {name} of wnids.txt has no images in "
                f"train/{name}/images; unpack the data again"
            )
        files += [f"train/{name}/images/{file}" for file in images]
        labels += [label] * len(images)
    return TinyImageNet(root, tuple(files), tuple(labels))


def _val(root: Path, label_of: dict[str, int]) -> TinyImageNet:
    """Return all images that val/val_annotations.txt lists, in the order of its lines."""
    annotations = root / "val" / "val_annotations.txt"
    if not os.path.isfile(annotations):
        raise UsageError(
            f"{annotations.resolve()} is not there; it lists the classes of the images in "
            "val/images: unpack the data again (a val/ sorted into classes is not the original)"
        )
    images = set(_images(root / "val" / "images"))
    files, labels = [], []
    for number, line in enumerate(_lines(annotations), 1):
        file, _, rest = line.partition("\t")
        name = rest.split("\t")[0]
        where = f"{annotations.resolve()}, line {number}"
        if name not in label_of:
            raise UsageError(
                f"{where}: {name!r} is not a class of wnids.txt; unpack the data again"
            )
        if file not in images:
            raise UsageError(f"{where}: {file!r} is not in val/images; unpack the data again")
        files.append(f"val/images/{file}")
        labels.append(label_of[name])
    return TinyImageNet(root, tuple(files), tuple(labels))


def _images(folder: Path) -> list[str]:
    """Return the sorted names of a folder's image files; empty if there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return [e.name for e in entries(folder) if e.name.upper().endswith(".JPEG")]


def _lines(path: Path) -> list[str]:
    """Return a file's lines without empty ones; UsageError if it is empty or cannot be read."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{path}: cannot be read: {reason}") from None
    if not any(lines):
        raise UsageError(f"{path.resolve()} is empty; unpack the data again")
    return [line for line in lines if line]
