"""The image and the label of an item, whatever form the items of a data set have.

An item is a pair, a longer tuple or list, a mapping, or an object with attributes. `data.keys`
names the two parts. Otherwise names that everybody uses tell them, or the first two positions.

Labels are whole numbers. A float or a one-hot vector is one where nothing is lost. Images are
tensors, arrays or PIL images.

Not covered: which items there are, and the errors that they raise (`sources.py`); soft labels and
several labels per image; parts inside of parts.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from switokd.data import pictures
from switokd.errors import UsageError

Key = str | int
"""Of a part of an item: a key or an attribute, or a position."""
Keys = tuple[Key, Key]
"""Of image and label."""

ENCODED = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "pgm", "ppm", "tif", "tiff")
"""Names of images in WebDataset's samples, which are suffixes of files."""
IMAGE_NAMES = frozenset(
    ("image", "images", "img", "imgs", "picture", "pixel_values", "pixels", "x", "input", "inputs")
).union(ENCODED)
LABEL_NAMES = frozenset(
    ("label", "labels", "target", "targets", "y", "class", "cls", "class_id", "class_label")
).union(("label_id", "label_idx", "fine_label", "fine_labels"))
"""`coarse_label` is none of them: CIFAR-100 has both, and 100 classes."""

CHANNELS = (1, 2, 3, 4)
"""Sizes of an array's dimension that are taken for its channels."""
MOST_NAMES = 12
"""How many names of parts an error lists."""
MOST_CLASSES = 2**24
"""More classes than any data set has: larger labels are numbers of something else."""
NO_ITEM = (Tensor, np.ndarray, np.generic, Image.Image, str, bytes, Number)
"""Values that are no items, although some have attributes."""


def choose(item: Any, keys: Keys | None = None) -> Keys:
    """Return the keys of an item's image and label; UsageError if nothing tells which they are.

    keys: those of the run file; None: guess them.
    """
    if keys is not None:
        for key in keys:
            if not _has(item, key):
                raise UsageError(f"data.keys: an item has no {key!r}; it has {_listed(item)}")
        return keys
    names, is_sequence = _names(item), isinstance(item, tuple | list)
    candidates = [_known(names, known) for known in (IMAGE_NAMES, LABEL_NAMES)]
    if all(len(found) == 1 for found in candidates):
        return candidates[0][0], candidates[1][0]
    is_ambiguous = any(len(found) > 1 for found in candidates)
    if names and (is_ambiguous or not is_sequence):
        image, label = (" or ".join(found) or "unknown" for found in candidates)
        raise UsageError(
            f"an item has {_listed(item)}; the image is {image}, the label is {label}: name both "
            "with data.keys=[IMAGE, LABEL]"
        )
    if is_sequence and len(item) >= 2:
        return 0, 1
    raise UsageError(
        f"an item must be (image, label), got {describe(item)}; data.keys=[IMAGE, LABEL] names the "
        "parts of other items"
    )


def parts_of(item: Any, keys: Keys | None = None) -> tuple[Any, Any]:
    """Return an item's image and label; UsageError if nothing tells which they are."""
    if keys is None and type(item) is tuple and len(item) >= 2:
        return item[0], item[1]
    image, label = choose(item, keys)
    return _part(item, image), _part(item, label)


def left_out(item: Any, keys: Keys | None = None) -> str:
    """Name the parts of an item that are not used; empty if there are none."""
    chosen, names = choose(item, keys), _names(item)
    if isinstance(item, tuple | list):
        used = [k % len(item) if isinstance(k, int) else names.index(k) for k in chosen]
        labels = names or [f"part {at}" for at in range(len(item))]
        return ", ".join(label for at, label in enumerate(labels) if at not in used)
    return ", ".join(str(name) for name in names if name not in chosen)


def _names(item: Any) -> list[Any]:
    """Return the names of an item's parts; empty if its parts have positions only."""
    if _is_mapping(item):
        return list(item.keys())
    if isinstance(item, tuple | list):
        return list(getattr(item, "_fields", ()))
    if item is None or isinstance(item, NO_ITEM):
        return []
    if is_dataclass(item):
        return [field.name for field in fields(item)]
    if attributes := getattr(type(item), "__attrs_attrs__", None):  # of the package attrs
        return [attribute.name for attribute in attributes]
    return [name for name in getattr(item, "__dict__", ()) if not name.startswith("_")]


def _is_mapping(item: Any) -> bool:
    return isinstance(item, Mapping) or (hasattr(item, "keys") and hasattr(item, "__getitem__"))


def _known(names: list[Any], known: frozenset[str]) -> list[str]:
    """Return those of the names that are known, in any case of letters."""
    return [name for name in names if isinstance(name, str) and name.lower() in known]


def _has(item: Any, key: Key) -> bool:
    if isinstance(item, tuple | list) and isinstance(key, int):
        return -len(item) <= key < len(item)
    if key in _names(item):
        return True
    is_object = not isinstance(item, tuple | list) and not _is_mapping(item)
    return is_object and isinstance(key, str) and hasattr(item, key)  # a property


def _part(item: Any, key: Key) -> Any:
    is_index = isinstance(item, tuple | list) and isinstance(key, int)
    return item[key] if is_index or _is_mapping(item) else getattr(item, str(key))


def _listed(item: Any) -> str:
    """Name an item's parts, for an error."""
    names = [str(name) for name in _names(item)]
    if not names and isinstance(item, tuple | list):
        return f"{len(item)} parts, counted from 0"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{', '.join(names[:MOST_NAMES])}{more}" if names else f"no parts: {describe(item)}"


def describe(value: Any) -> str:
    """Describe a value for an error: its type, and its shape or the value itself if it is short."""
    name = type(value).__name__
    if isinstance(value, Tensor | np.ndarray):
        return f"a {name} of {value.dtype} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {name} of {len(value)}: {str(value)[:60]!r}"
    return f"{name} {str(value)[:60]!r}" if isinstance(value, str | bytes | Number) else name


def class_of(label: Any, classes: int | None = None) -> tuple[int, int]:
    """Return the class of a label, and the number of classes that it implies.

    A label is a whole number, a float or an array of one number without a fraction, or a one-hot
    vector `[classes]`. classes: length of a one-hot vector; None: any. UsageError for all others.
    """
    if isinstance(label, np.bool_):  # NumPy 2.2 and newer warn of it as an index
        label = bool(label)
    try:
        number = operator.index(label)
        _check_size(number)
        return number, number + 1
    except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers raises any of these
        values = _numbers(label)
    if values.size == 1:
        value = values.reshape(())[()]
        if not np.isfinite(value) or value != np.floor(value):
            raise UsageError(f"the label {value:g} is not a whole number")
        _check_size(int(value))
        return int(value), int(value) + 1
    if values.size != max(values.shape, default=0):
        raise UsageError(
            f"the label must be a whole number or one-hot, got {describe(label)}; if it is another "
            "part of an item, name both with data.keys=[IMAGE, LABEL]"
        )
    ones = np.flatnonzero(values)
    if len(ones) != 1 or values.reshape(-1)[ones[0]] != 1:
        raise UsageError(f"{_not_one_hot(values)}, got {str(values.reshape(-1).tolist())[:60]}")
    if classes is not None and values.size != classes:
        raise UsageError(
            f"a one-hot label of {values.size} numbers, and the data set has {classes} classes"
        )
    return int(ones[0]), values.size


def _check_size(number: int) -> None:
    if number >= MOST_CLASSES:
        raise UsageError(
            f"the label {str(number)[:30]} is too large; number the classes from 0 without gaps"
        )


def _numbers(label: Any) -> NDArray[Any]:
    """Return a label as an array; UsageError if it does not hold real numbers."""
    if isinstance(label, Tensor):
        label = label.detach().cpu()
        label = label.double() if label.is_floating_point() else label
    try:
        values = np.asarray(label)
    except (TypeError, ValueError, RuntimeError):
        values = np.empty(0, dtype=object)
    if values.dtype.kind not in "biuf" or not values.size:
        hint = ", which is the number of its class" if isinstance(label, str | bytes) else ""
        raise UsageError(f"the label must be a whole number{hint}, got {describe(label)}")
    return values


def _not_one_hot(values: NDArray[Any]) -> str:
    """Say what a vector is that is not one-hot."""
    if np.isin(values, (0, 1)).all():
        return "the label must be one class per image"
    if (values >= 0).all() and abs(float(values.sum()) - 1) < 1e-3:
        return (
            "a soft label is not supported: give the number of one class (data.label_smoothing, "
            "data.mixup and data.cutmix make soft targets)"
        )
    return "the label must be a whole number or one-hot"


def image_tensor(image: Any) -> Tensor:
    """Return an image as a tensor `[C, H, W]` of bytes or floats; UsageError for another value.

    A tensor `[C, H, W]` or `[H, W]` keeps its values; so does an array, `[H, W]`, `[H, W, C]` or
    `[C, H, W]` (see `_channels_first`). Other whole numbers become bytes if they are 0 to 255.
    A PIL image becomes bytes of grey or RGB (`pictures.plain`).
    """
    if isinstance(image, Tensor):
        if image.is_meta or image.is_quantized or image.is_nested:
            kind = "without values" if image.is_meta else "quantized or nested"
            raise UsageError(f"an image must be a plain tensor, got one that is {kind}")
        image = image.detach().to_dense() if image.layout != torch.strided else image.detach()
        tensor = image.clone()  # the data set may use the memory again for its next item
    elif isinstance(image, Image.Image):
        tensor = _channels_first(np.array(pictures.plain(image, channels=None)))
    else:
        tensor = _channels_first(_array(image))
    if tensor.dim() == 2:
        tensor = tensor[None]
    if tensor.dim() != 3 or not tensor.numel():
        raise UsageError(f"an image must be [channels, height, width], got {list(tensor.shape)}")
    return tensor if tensor.is_floating_point() else _bytes(tensor)


def _array(image: Any) -> NDArray[Any]:
    """Return an image as an array in the machine's byte order; UsageError if it has no numbers."""
    if not isinstance(image, str | bytes | Mapping) and image is not None:
        try:
            array = np.array(image)  # a copy: PyTorch takes no negative strides
        except (TypeError, ValueError, RuntimeError):
            array = np.empty(0, dtype=object)
        if array.dtype.kind in "biuf" and array.dtype.itemsize <= 8:
            return array.astype(array.dtype.newbyteorder("="), copy=False)
    raise UsageError(f"an image must be a tensor, an array or a PIL image, got {describe(image)}")


def _channels_first(array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor with its channels first.

    The channels are the dimension before or after two equal ones, which are a square image.
    Otherwise they are the last dimension if it is 1 to 4, as in image files, or else the first one
    if it is. UsageError if none of this tells them.
    """
    tensor = torch.from_numpy(array)
    if tensor.dim() != 3:
        return tensor
    a, b, c = tensor.shape
    is_first, is_last = a != b == c, a == b != c
    if is_last or (c in CHANNELS and not is_first):
        return tensor.permute(2, 0, 1)
    if is_first or a in CHANNELS:
        return tensor
    raise UsageError(
        f"an array {[a, b, c]} does not tell which dimension is its channels; return a tensor "
        "[channels, height, width]"
    )


def _bytes(tensor: Tensor) -> Tensor:
    """Return whole numbers as bytes; UsageError if one is not 0 to 255."""
    if tensor.dtype == torch.uint8:
        return tensor
    name = str(tensor.dtype).removeprefix("torch.")
    if name in ("bool", "uint16") or tensor.is_complex():
        raise UsageError(f"an image must hold bytes or floats, got {name}")
    tensor = tensor.long()
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high > 255:
        raise UsageError(
            f"an image of whole numbers must hold 0 to 255, got {low} to {high} ({name}); scale it "
            "to bytes or floats"
        )
    return tensor.to(torch.uint8)
