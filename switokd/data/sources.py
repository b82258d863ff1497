"""Data sets: where images and labels come from, before any augmentation.

    digits          scikit-learn's 1,797 handwritten digits, 8 x 8; inside the package
    fashion-mnist   torchvision's, from a folder
    cifar10, cifar100          likewise
    tiny-imagenet   its own folder layout, as downloaded (tiny_imagenet.py)
    image-folder    a folder with train/CLASS/*.jpg and val/CLASS/*.jpg
    imagenet        the same, with ImageNet's 1,000 classes
    package.module:callable    any: called with `train: bool` and data.kwargs, returns a
                    map-style data set of (image, label)

Not covered: streams without a length, targets that are not class labels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from switokd.data.augment import Keys, seeding
from switokd.errors import UsageError, first_line
from switokd.runtime.device import to_device


class Source(Protocol):
    """Images and labels by index."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """Images `[B, C, H, W]` (uint8, or float ready for use) and labels `[B]`.

        keys: `[B]`, one per sample, for transforms that draw random numbers.
        """
        ...


@dataclass(frozen=True)
class ArraySource:
    """All images in memory: uint8 `[N, C, H, W]`, labels `[N]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ArraySource:
        """The same images on another device."""
        return ArraySource(self.images.to(device), self.labels.to(device))

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """See `Source`."""
        at = to_device(self.images.device, torch.as_tensor(indices))
        return self.images[at], self.labels[at]


@dataclass(frozen=True)
class ItemSource:
    """Any map-style data set of (image, label), one item at a time."""

    items: Any
    classes: int
    where: str

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """See `Source`. UsageError for labels outside the classes or images that do not fit."""
        images, labels = [], []
        with seeding() as seed:
            for index, key in zip(indices, keys.tolist(), strict=True):
                seed(key)
                image, label = _pair(self.items, index, self.where)
                images.append(_as_tensor(image, f"{self.where}, sample {index}"))
                labels.append(label)
                if not 0 <= label < self.classes:
                    raise UsageError(
                        f"{self.where}, sample {index}: label {label} is outside the "
                        f"{self.classes} classes (0 to {self.classes - 1})"
                    )
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise UsageError(f"{self.where}: images of one batch differ in shape: {sorted(shapes)}")
        return torch.stack(images), torch.tensor(labels)


@dataclass(frozen=True)
class Sources:
    """A data set's two parts, and what follows from it for networks and augmentation."""

    train: Source
    test: Source
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    names: tuple[str, ...] = ()
    """The classes' names, in the labels' order; empty where the data set has none."""
    resize: int | None = None
    """Shorter side that test pictures are resized to before their middle is cut out."""


def _pair(items: Any, index: int, where: str) -> tuple[Any, int]:
    """One (image, label); UsageError if the item is none, or its file cannot be read."""
    try:
        item = items[index]
    except (OSError, SyntaxError) as error:  # what Pillow says of files that are no whole pictures
        file = _file_of(items, index, where)
        raise UsageError(f"{file} cannot be read: {first_line(error)}") from error
    try:
        image, label = item
        return image, operator.index(label.item() if hasattr(label, "item") else label)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"{where}, sample {index}: an item must be (image, label), the label a whole "
            f"number, got {str(item)[:60]!r}"
        ) from None


def _file_of(items: Any, index: int, where: str) -> str:
    """Where an item comes from: its file, where the data set knows that, as ImageFolder does."""
    try:
        return str(items.samples[index][0])
    except (AttributeError, IndexError, KeyError, TypeError):
        return f"{where}, sample {index}"


def label_of(items: Any, index: int, where: str) -> int:
    """The label of one item; UsageError if the item is no (image, label)."""
    return _pair(items, index, where)[1]


def _as_tensor(image: Any, where: str) -> Tensor:
    """An image as `[C, H, W]`: a tensor as it is, a PIL image or array `[H, W(, C)]` as bytes."""
    if isinstance(image, Tensor):
        tensor = image
    else:
        array = np.array(image)
        if array.dtype != np.uint8:
            raise UsageError(f"{where}: an image must be a tensor or hold bytes, got {array.dtype}")
        tensor = torch.from_numpy(array)
        tensor = tensor[None] if tensor.dim() == 2 else tensor.permute(2, 0, 1)
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise UsageError(f"{where}: a tensor must hold bytes or floats, got {tensor.dtype}")
    if tensor.dim() != 3:
        raise UsageError(
            f"{where}: an image must be [channels, height, width], got {list(tensor.shape)}"
        )
    return tensor
