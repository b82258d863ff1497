"""Sources of a data set that is not switokd's own: the user's, or another library's.

A data set has a length and items by number. What it says of itself is checked once, when it is
opened: its length, its classes, and the parts of its first item.

Not covered: data sets that can only be iterated. Their samples have no numbers, so that the seed
cannot draw their order.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Set, Sized
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from switokd.data import items as forms
from switokd.data.augment import seeding
from switokd.data.sources import ItemSource, Sources
from switokd.errors import UsageError, own_code_errors


def of_items(
    parts: tuple[Any, Any],
    where: str,
    keys: forms.Keys | None = None,
    classes: int | None = None,
    reader: str = "",
) -> Sources:
    """Make sources of a training and a test set; UsageError if they are no data sets.

    where: names the data set in errors. keys: of an item's image and label; None: guess them.
    classes: number of classes; None: what the training set says, or else one more than its largest
    label. reader: as in `ItemSource`.
    """
    train, test = (
        ItemSource(part, 0, f"{where}, {name}", _length(part, f"{where}, {name} set"), keys, reader)
        for part, name in zip(parts, ("training", "test"), strict=True)
    )
    with seeding() as seed:  # random transforms must not change the training's generators
        seed(0)
        first = train.item(0)
        with train.named_errors(0):
            chosen, unused = forms.choose(first, keys), forms.left_out(first, keys)
        _check_same_kind(train, test, first, where)
    names: tuple[str, ...] = ()
    if classes is None:
        classes, names = _classes(parts[0], chosen[1], where)
    if classes is None:
        classes = _counted(train)
    note = f"{where}: image {chosen[0]}, label {chosen[1]}; not used: {unused}"
    # Images of bytes are scaled to [-1, 1]; images of floats are not scaled.
    return Sources(
        replace(train, classes=classes),
        replace(test, classes=classes),
        classes,
        mean=(0.5,),
        std=(0.5,),
        names=names,
        notes=(note,) if unused else (),
    )


def _check_same_kind(train: ItemSource, test: ItemSource, first: Any, where: str) -> None:
    """UsageError if training and test images differ in kind or channels; first: training item 0.

    Bytes are scaled and floats are not, so that a network would be tested on other values.
    """
    kinds = []
    for source, item in ((train, first), (test, test.item(0))):
        with source.named_errors(0):
            image = forms.image_tensor(forms.parts_of(item, source.keys)[0])
        kind = "bytes" if image.dtype == torch.uint8 else "floats"
        kinds.append(f"{kind} of {len(image)} channel{'s' * (len(image) > 1)}")
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"{where}: training images are {kinds[0]}, and test images {kinds[1]}; end both with "
            "the same transforms (bytes are scaled, floats are not)"
        )


def _length(part: Any, what: str) -> int:
    """Return the length of a data set; UsageError if it has none, no items or no samples.

    what: names the data set in errors. OwnCodeError if its length is no number or raises an error.
    """
    with own_code_errors(f"{what}, its length", __file__, every_rank=True):
        if isinstance(part, DataLoader):
            raise UsageError(
                f"{what} is a DataLoader, which makes batches itself; give its data set (.dataset)"
            )
        has_numbers = hasattr(part, "__len__") and hasattr(part, "__getitem__")
        if isinstance(part, IterableDataset) or (not has_numbers and hasattr(part, "__iter__")):
            raise UsageError(
                f"{what} is a {type(part).__name__}, which can only be iterated: its samples have "
                "no numbers, and the seed cannot draw their order; give a data set with __len__ "
                "and __getitem__, such as list(...) of it; for .tar shards, data.dataset=webdataset"
            )
        if not has_numbers:
            raise UsageError(
                f"{what}: it must be a data set with a length and items, got {type(part).__name__}"
            )
        length = len(part)
    if not length:
        raise UsageError(f"{what} is a data set without samples")
    return length


def _classes(items: Any, label: forms.Key, where: str) -> tuple[int | None, tuple[str, ...]]:
    """Return number and names of the classes that a data set tells; None if it tells neither.

    label: key of an item's label. They are the data set's `classes`, a number or names, or what
    Hugging Face's data sets tell of their column of labels.
    """
    with own_code_errors(f"{where}, its classes", __file__, every_rank=True):
        told = getattr(items, "classes", None)
        features = getattr(items, "features", None)
        if told is None and isinstance(features, Mapping):
            told = getattr(features.get(label), "names", None)
        if told is None:
            return None, ()
        try:
            count = operator.index(told)
        except TypeError:
            return _names(told, where)
    if count < 1:
        raise UsageError(f"{where}: its `classes` is {count}; there must be at least 1")
    return count, ()


def _names(told: Any, where: str) -> tuple[int, tuple[str, ...]]:
    """Return number and names of the classes of a list of names, or of labels by name."""
    if isinstance(told, str | bytes | Set) or not isinstance(told, Sized) or not len(told):
        raise UsageError(
            f"{where}: its `classes` must be a number or a list of names, got "
            f"{forms.describe(told)}"
        )
    labels = {str(label) for label in told.values()} if isinstance(told, Mapping) else set()
    if isinstance(told, Mapping) and labels == {str(label) for label in range(len(told))}:
        told = sorted(told, key=lambda name: int(told[name]))  # as torchvision's class_to_idx
    return len(told), tuple(str(name) for name in told)


def _counted(source: ItemSource) -> int:
    """Return one more than the largest label; reads every item once."""
    with seeding() as seed:
        count = 0
        for index in range(len(source)):
            seed(index)
            number, implied = source.label_of(index)
            if number < 0:
                raise UsageError(f"{source.where} sample {index}: label {number} is below 0")
            count = max(count, implied)
    return count
