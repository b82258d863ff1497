"""Data sets by their name in the run file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from switokd import plugins
from switokd.config.sections import Data
from switokd.data import tiny_imagenet
from switokd.data.sources import ArraySource, ItemSource, Sources, label_of
from switokd.errors import UsageError, nearest
from switokd.plugins import import_callable, is_object


def open_sources(data: Data) -> Sources:
    """Open the data set; UsageError if it is unknown or missing, saying where it is to be put."""
    if is_object(data.dataset):
        given = plugins.datasets(data.dataset)
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
