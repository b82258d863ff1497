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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from switokd import objects
from switokd.data import tiny_imagenet
from switokd.data.augment import Keys, seeding
from switokd.errors import UsageError, first_line, nearest
from switokd.imports import import_callable
from switokd.objects import is_object
from switokd.sections import Data
from switokd.transfer import onto


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
        at = onto(self.images.device, torch.as_tensor(indices))
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


def load(data: Data) -> Sources:
    """Open the data set; UsageError if it is unknown or missing, saying where it is to be put."""
    if is_object(data.dataset):
        given = objects.datasets(data.dataset)
        return _of_items([given.train, given.test], data.dataset, given.classes)
    if ":" in data.dataset:
        return _custom(data)
    if data.dataset not in BY_NAME:
        raise UsageError(
            f"data.dataset: found {data.dataset!r}{nearest(data.dataset, BY_NAME)}; allowed: "
            f"{', '.join(BY_NAME)}, or package.module:callable"
        )
    return BY_NAME[data.dataset](data)


def _digits_table() -> NDArray[np.float64]:
    """Pixels and label, a row per image; to import scikit-learn takes every rank a second."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def _digits(data: Data) -> Sources:
    table = _digits_table()
    # 16 grey levels, spread over a byte. The last fifth, from other writers, is the test set.
    images = torch.from_numpy(table[:, :-1] * 255 / 16).round().byte().view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, -1]).long()
    cut = len(labels) * 4 // 5
    return Sources(
        ArraySource(images[:cut], labels[:cut]),
        ArraySource(images[cut:], labels[cut:]),
        classes=10,
        mean=(0.306,),
        std=(0.377,),
        crop_padding=1,
        names=tuple("0123456789"),
    )


def _fashion_mnist(data: Data) -> Sources:
    train, test = (_torchvision("FashionMNIST", data, train) for train in (True, False))
    return Sources(
        ArraySource(train.data[:, None], train.targets),
        ArraySource(test.data[:, None], test.targets),
        classes=10,
        mean=(0.286,),
        std=(0.353,),
        crop_padding=2,
        flip=True,
        names=tuple(train.classes),
    )


def _cifar(
    name: str, classes: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Data], Sources]:
    def open_cifar(data: Data) -> Sources:
        parts = [_torchvision(name, data, train) for train in (True, False)]
        arrays = [
            ArraySource(
                torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
                torch.tensor(part.targets),
            )
            for part in parts
        ]
        names = tuple(parts[0].classes)
        return Sources(arrays[0], arrays[1], classes, tuple(mean), tuple(std), 4, True, names)

    return open_cifar


def _torchvision(name: str, data: Data, train: bool) -> Any:
    import torchvision

    # The ranks of a machine share the folder: one downloads, the others find it done.
    lock = FileLock(f"{data.root}.lock") if data.download else nullcontext()
    try:
        with lock:
            make = getattr(torchvision.datasets, name)
            return make(data.root, train=train, download=data.download)
    except (RuntimeError, OSError) as error:
        layout = {
            "FashionMNIST": "FashionMNIST/raw/train-images-idx3-ubyte (unpacked) and its siblings",
            "CIFAR10": "cifar-10-batches-py/",
            "CIFAR100": "cifar-100-python/",
        }[name]
        raise UsageError(
            f"data.root: {name} is not in {Path(data.root).resolve()} ({error}); put "
            f"{layout} there, or set data.download=true"
        ) from None


def _image_folder(data: Data) -> Sources:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop = data.image_size
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.uint8)]
    train = v2.Compose([v2.RandomResizedCrop(crop, antialias=True), *to_tensor])
    resize = round(crop * 8 / 7)
    whole = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(crop), *to_tensor])
    root = Path(data.root)
    try:
        test_folder = next((root / n for n in ("val", "test") if (root / n).is_dir()), root / "val")
        parts = [ImageFolder(root / "train", train), ImageFolder(test_folder, whole)]
    except OSError as error:
        raise UsageError(
            f"data.root: {root.resolve()} must hold train/CLASS/... and val/CLASS/... with at "
            f"least one image file in each class folder ({error})"
        ) from None
    if parts[0].classes != parts[1].classes:
        odd = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise UsageError(f"{root.resolve()}: train and {test_folder.name} differ in classes: {odd}")
    names = tuple(parts[0].classes)
    sources = [ItemSource(part, len(names), str(root)) for part in parts]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    return Sources(
        *(sources[0], sources[1], len(names), mean, std), flip=True, names=names, resize=resize
    )


def _imagenet(data: Data) -> Sources:
    sources = _image_folder(data)
    if sources.classes != 1000:
        raise UsageError(
            f"data.root: {Path(data.root).resolve()} has {sources.classes} classes, and imagenet "
            "1000; use data.dataset=image-folder for another set of classes"
        )
    return sources


def _tiny_imagenet(data: Data) -> Sources:
    try:
        train, val, names = tiny_imagenet.open_tiny_imagenet(data.root)
    except OSError as error:  # what is there, but not for us to read
        raise UsageError(f"data.root: {data.root} cannot be read: {error}") from None
    parts = [ItemSource(part, len(names), str(part.root)) for part in (train, val)]
    mean, std = tiny_imagenet.MEAN, tiny_imagenet.STD
    return Sources(
        *(parts[0], parts[1], len(names), mean, std), crop_padding=4, flip=True, names=tuple(names)
    )


def _custom(data: Data) -> Sources:
    make = import_callable(data.dataset, "data.dataset")
    try:
        parts = [make(train=train, **data.kwargs) for train in (True, False)]
    except TypeError as error:
        raise UsageError(
            f"data.dataset {data.dataset} is called with train=True or False and data.kwargs "
            f"{data.kwargs}: {error}"
        ) from error
    return _of_items(parts, data.dataset)


def _of_items(parts: Sequence[Any], where: str, classes: int | None = None) -> Sources:
    """A user's training and test set; `where` names them. Classes are found out if not given."""
    for part in parts:
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise UsageError(
                f"data.dataset {where} must return a data set with a length and items, got "
                f"{type(part).__name__}"
            )
        if not len(part):
            raise UsageError(f"data.dataset {where} returned a data set without samples")
    named = getattr(parts[0], "classes", None) if classes is None else classes
    if named is None:  # then every label has to be looked at
        labels = (label_of(parts[0], i, where) for i in range(len(parts[0])))
        classes = 1 + max(labels)
    else:
        classes = named if isinstance(named, int) else len(named)
    names = () if named is None or isinstance(named, int) else tuple(str(name) for name in named)
    sources = [ItemSource(part, classes, where) for part in parts]
    # uint8 images are scaled to [-1, 1]; float images are used as they come.
    return Sources(sources[0], sources[1], classes, mean=(0.5,), std=(0.5,), names=names)


BY_NAME: dict[str, Callable[[Data], Sources]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar("CIFAR10", 10, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "cifar100": _cifar("CIFAR100", 100, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "tiny-imagenet": _tiny_imagenet,
    "image-folder": _image_folder,
    "imagenet": _imagenet,
}


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
