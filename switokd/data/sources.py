"""Images and labels by index, before augmentation: in memory, or item by item.

Not covered: opening a data set by its name (`named.py`); targets that are not class labels.
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
    """Images and labels of one part of a data set, by index."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """Return images `[B, C, H, W]` and labels `[B]`.

        Images of uint8 will be normalised; images of floats are used unchanged. keys: `[B]`, seeds
        of the samples' random transforms.
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
        """Return a copy on another device."""
        return ArraySource(self.images.to(device), self.labels.to(device))

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """See `Source`."""
        at = to_device(self.images.device, torch.as_tensor(indices))
        return self.images[at], self.labels[at]


@dataclass(frozen=True)
class ItemSource:
    """A map-style data set of (image, label), read item by item."""

    items: Any
    classes: int
    where: str
    """Names the data set in errors."""

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """See `Source`. UsageError for a label outside the classes or an invalid image."""
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
    """Training and test images of a data set, its classes, normalisation and usual augmentation."""

    train: Source
    test: Source
    classes: int
    """Number of classes."""
    mean: tuple[float, ...]
    """By channel, of pixel values in [0, 1]; one value is for all channels."""
    std: tuple[float, ...]
    """By channel, like `mean`."""
    crop_padding: int = 0
    """Pixels of padding before a random crop, if data.crop_padding is null."""
    flip: bool = False
    """Whether to mirror images at random, if data.flip is null."""
    names: tuple[str, ...] = ()
    """Names of the classes, in the order of the labels; empty if the data set has none."""
    resize: int | None = None
    """Pixels of the shorter side of a test image before its centre is cropped; None: no resize."""


def _pair(items: Any, index: int, where: str) -> tuple[Any, int]:
    """Return one (image, label); UsageError for another item or a file that cannot be read."""
    try:
        item = items[index]
    except (OSError, SyntaxError) as error:  # Pillow raises these for damaged files
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
    """Return the file of an item if the data set lists it, as ImageFolder does, else its number."""
    try:
        return str(items.samples[index][0])
    except (AttributeError, IndexError, KeyError, TypeError):
        return f"{where}, sample {index}"


def label_of(items: Any, index: int, where: str) -> int:
    """Return the label of one item; UsageError if the item is not (image, label)."""
    return _pair(items, index, where)[1]


def _as_tensor(image: Any, where: str) -> Tensor:
    """Return an image as `[C, H, W]`; UsageError for another shape or type.

    A tensor is returned unchanged. A PIL image or array `[H, W]` or `[H, W, C]` must hold bytes.
    """
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
