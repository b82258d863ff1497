"""Images sorted by class: train/CLASS/... and val/CLASS/... or test/CLASS/...

A label is the position of the class among the sorted names of train's folders, as with
torchvision's ImageFolder. A class folder may have subfolders.

Not covered: archives; a list of labels in a file; scaling and augmentation (`named.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from PIL.Image import Image

from switokd.data import pictures
from switokd.data.image_files import SUFFIXES, below, entries, is_dangling, why_missing
from switokd.errors import UsageError

MOST_NAMES = 5
"""Classes that a message lists."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files with their labels."""

    root: Path
    files: tuple[str, ...]
    """Paths relative to root."""
    targets: tuple[int, ...]
    """Labels, in the order of the files."""
    transform: Callable[[Image], Any]
    """Makes the item's image from an RGB picture."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return the transformed image and its label; UsageError if the file is no image."""
        try:
            image = pictures.load(self.root / self.files[index], channels=3)
        except UsageError as error:
            raise UsageError(f"{error}; replace or delete this file") from None
        return self.transform(image), self.targets[index]


def open_image_folder(
    data_root: str,
    allow_empty_classes: bool,
    train_transform: Callable[[Image], Any],
    test_transform: Callable[[Image], Any],
) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """Return training images, test images, and the names of the classes by label.

    allow_empty_classes: whether a class may have no training or no test images. UsageError if a
    folder is missing, cannot be read or has no images, or if train and test differ in classes.
    """
    root = Path(data_root)
    train, test = _part(root, ("train",)), _part(root, ("val", "test"))
    classes = _classes(train)
    _check_same(train, test, classes, _classes(test), allow_empty_classes)
    parts = [
        _images(folder, classes, transform, allow_empty_classes)
        for folder, transform in ((train, train_transform), (test, test_transform))
    ]
    return parts[0], parts[1], classes


def _part(root: Path, names: Sequence[str]) -> Path:
    """Return the first of these folders in root; UsageError if there is none."""
    for name in names:
        # A link to nowhere is meant to be the folder: do not take the next one in silence.
        if os.path.isdir(root / name) or os.path.islink(root / name):
            break
    else:
        name = names[0]
    folder = root / name
    if not os.path.isdir(folder):
        raise UsageError(
            f"data.root: {root.resolve()} must hold train/CLASS/... and val/CLASS/... with at "
            f"least one image file in each class folder; {name}: {why_missing(folder)}"
        )
    return folder


def _classes(folder: Path) -> list[str]:
    """Return the sorted names of the class folders; UsageError if there are none."""
    names = []
    for entry in entries(folder):
        if entry.is_dir():
            names.append(entry.name)
        elif is_dangling(entry):
            raise UsageError(
                f"data.root: {entry.path}: {why_missing(entry.path)}; mend or delete the link"
            )
    if not names:
        raise UsageError(
            f"data.root: {folder} has no class folders; put the images of each class into "
            f"{folder / 'CLASS'}"
        )
    return names


def _check_same(
    train: Path, test: Path, classes: list[str], test_classes: list[str], allow_empty: bool
) -> None:
    """UsageError if the two folders differ in classes; a test class may be missing if empty may."""
    only_train, only_test = set(classes) - set(test_classes), set(test_classes) - set(classes)
    if not only_test and (allow_empty or not only_train):
        return
    forms = [{normalize("NFC", name) for name in names} for names in (classes, test_classes)]
    # The same letters in two encodings look the same unless they are escaped.
    show = ascii if forms[0] == forms[1] else str
    lists = " and ".join(
        f"only {folder.name} has {_listed(map(show, names))}"
        for folder, names in ((train, only_train), (test, only_test))
        if names
    )
    remedy = "" if only_test else ", or set data.allow_empty_classes=true"
    if forms[0] == forms[1]:
        lists += " (the same letters in another encoding: Unicode NFC and NFD)"
    raise UsageError(
        f"data.root: {train.parent.resolve()}: {train.name} and {test.name} differ in classes: "
        f"{lists}; give both the same class folders{remedy}"
    )


def _images(
    folder: Path, classes: list[str], transform: Callable[[Image], Any], allow_empty: bool
) -> ImageFiles:
    """Return all images of the classes, in the order of torchvision's ImageFolder.

    UsageError if a class has none, unless allow_empty, or if no class has any.
    """
    files: list[str] = []
    targets: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        found = below(folder / name) if os.path.isdir(folder / name) else ()
        paths = sorted(found, key=os.path.split)
        files += [os.path.relpath(path, folder) for path in paths]
        targets += [label] * len(paths)
        if not paths:
            empty.append(name)
    if empty and not (allow_empty and files):
        remedy = "; fill or delete them, or set data.allow_empty_classes=true" if files else ""
        raise UsageError(
            f"data.root: {folder}: no image file ({', '.join(SUFFIXES)}) in {len(empty)} of "
            f"{len(classes)} class folders: {_listed(empty)}{remedy}"
        )
    return ImageFiles(folder, tuple(files), tuple(targets), transform)


def _listed(names: Iterable[str]) -> str:
    """Return sorted names with commas, the first ones if there are many."""
    ordered = sorted(names)
    more = len(ordered) - MOST_NAMES
    return ", ".join(ordered[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
