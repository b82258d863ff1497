"""Images and labels by index, before augmentation: in memory, or item by item.

Not covered: opening a data set by its name (`named.py`); the forms of items (`items.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from switokd.data import items as forms
from switokd.data.augment import Keys, seeding
from switokd.errors import OwnCodeError, UsageError, first_line, own_code_errors
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
    """A map-style data set, read item by item; `items.py` says which forms an item may have."""

    items: Any
    classes: int
    where: str
    """Names the data set in errors, with the part that this is: training or test."""
    length: int | None = None
    """Number of items, which all ranks agree on; None: the data set's own."""
    keys: forms.Keys | None = None
    """Of an item's image and label; None: guess them."""
    reader: str = ""
    """File of switokd's module that reads the items; empty if the data set is the user's."""

    def __len__(self) -> int:
        return len(self.items) if self.length is None else self.length

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """See `Source`. UsageError for an invalid item, OwnCodeError for one that raises."""
        images, labels = [], []
        with seeding() as seed:
            for index, key in zip(indices, keys.tolist(), strict=True):
                seed(key)
                image, label = self._read(index)
                images.append(image)
                labels.append(label)
        if len(kinds := {(image.dtype, image.shape) for image in images}) > 1:
            shown = (f"{str(kind).removeprefix('torch.')} {list(shape)}" for kind, shape in kinds)
            raise UsageError(
                f"{self.where} set: images of one batch differ: {', '.join(sorted(shown))}; make "
                "them equal in the data set, or with data.image_size for huggingface and webdataset"
            )
        return torch.stack(images), torch.tensor(labels)

    def label_of(self, index: int) -> tuple[int, int]:
        """Return an item's label, and the number of classes that it implies; errors as `fetch`."""
        item = self.item(index)
        with self.named_errors(index):
            return forms.class_of(forms.parts_of(item, self.keys)[1])

    def item(self, index: int) -> Any:
        """Return one item; UsageError, or OwnCodeError if the user's code raises an error."""
        sample = f"{self.where} sample {index}"
        try:
            with own_code_errors(sample, self.reader or __file__, every_rank=True):
                return self.items[index]
        except OwnCodeError as error:
            cause = error.__cause__
            if isinstance(cause, OSError | SyntaxError) and (file := self._file_of(index)):
                # Pillow raises these for damaged files.
                raise UsageError(f"{file} cannot be read: {first_line(cause)}") from cause
            if isinstance(cause, IndexError | StopIteration):
                counted = f"{error}; the data set says that it has {len(self)} samples"
                raise OwnCodeError(counted, every_rank=True) from cause
            raise
        except UsageError as error:
            if not self.reader:
                raise
            raise UsageError(f"{sample}: {error}") from None

    def _file_of(self, index: int) -> str:
        """Return the file of an item if the data set lists it, as ImageFolder does."""
        try:
            return str(self.items.samples[index][0])
        except (AttributeError, IndexError, KeyError, TypeError):
            return ""

    def _read(self, index: int) -> tuple[Tensor, int]:
        """Return image and label of one item."""
        item = self.item(index)
        with self.named_errors(index):
            image, label = forms.parts_of(item, self.keys)
            tensor, (number, _) = forms.image_tensor(image), forms.class_of(label, self.classes)
            if not 0 <= number < self.classes:
                raise UsageError(
                    f"label {number} is outside the {self.classes} classes "
                    f"(0 to {self.classes - 1})"
                )
        return tensor, number

    @contextmanager
    def named_errors(self, index: int) -> Iterator[None]:
        """Name the sample in errors of the body, where an item may do its work only now."""
        sample = f"{self.where} sample {index}"
        try:
            with own_code_errors(sample, forms.__file__, every_rank=True):
                yield
        except OwnCodeError:
            raise
        except UsageError as error:
            raise UsageError(f"{sample}: {error}") from None


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
    notes: tuple[str, ...] = ()
    """What a user should know about the data, such as parts of the items that are not used."""
