"""Opens the data set that the run file names.

    digits          scikit-learn's 1,797 handwritten digits, 8 x 8, from its package
    fashion-mnist   torchvision's, from data.root
    cifar10, cifar100          torchvision's, from data.root
    tiny-imagenet   its original folder layout, as downloaded (tiny_imagenet.py)
    image-folder    a folder with train/CLASS/*.jpg and val/CLASS/*.jpg
    imagenet        an image-folder with ImageNet's 1,000 classes
    package.module:callable    the user's own: called with `train: bool` and data.kwargs, returns a
                    map-style data set of (image, label)

Not covered: data sets without a length; targets that are not class labels.
"""

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
    """Open the data set; UsageError if it is unknown or missing, with the folder to put it in."""
    if is_object(data.dataset):
        lent = plugins.datasets(data.dataset)
        return _of_items([lent.train, lent.test], data.dataset, lent.classes)
    if ":" in data.dataset:
        return _custom(data)
    if data.dataset not in BY_NAME:
        raise UsageError(
            f"data.dataset: found {data.dataset!r}{nearest(data.dataset, BY_NAME)}; allowed: "
            f"{', '.join(BY_NAME)}, or package.module:callable"
        )
    return BY_NAME[data.dataset](data)


def _digits_table() -> NDArray[np.float64]:
    """Read the digits as `[1797, 65]`: 64 pixels of 0 to 16, and the label.

    Read from scikit-learn's file, because its import takes a second in every rank.
    """
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
    """The digits, with 16 grey levels spread over a byte; the last fifth is the test set.

    Other persons have written the digits of the last fifth.
    """
    table = _digits_table()
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
    """Fashion-MNIST, from torchvision's folder layout."""
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
    """Return a function that opens CIFAR-10 or CIFAR-100; `name` is torchvision's."""

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
    """Open one part of torchvision's data set `name`; UsageError if its files are missing."""
    import torchvision

    # The ranks of a machine share the folder: one rank downloads, the others wait for it.
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
    """Images by class in train/ and val/ or test/, augmented and scaled as usual for ImageNet."""
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
        only_one = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise UsageError(
            f"{root.resolve()}: train and {test_folder.name} differ in classes: {only_one}"
        )
    names = tuple(parts[0].classes)
    sources = [ItemSource(part, len(names), str(root)) for part in parts]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
    return Sources(
        *(sources[0], sources[1], len(names), mean, std), flip=True, names=names, resize=resize
    )


def _imagenet(data: Data) -> Sources:
    """ImageNet: an image folder that must have 1,000 classes."""
    sources = _image_folder(data)
    if sources.classes != 1000:
        raise UsageError(
            f"data.root: {Path(data.root).resolve()} has {sources.classes} classes, and imagenet "
            "has 1000; use data.dataset=image-folder for another set of classes"
        )
    return sources


def _tiny_imagenet(data: Data) -> Sources:
    """Tiny-ImageNet, from its original folder layout."""
    try:
        train, val, names = tiny_imagenet.open_tiny_imagenet(data.root)
    except OSError as error:  # files without permission to read
        raise UsageError(f"data.root: {data.root} cannot be read: {error}") from None
    parts = [ItemSource(part, len(names), str(part.root)) for part in (train, val)]
    mean, std = tiny_imagenet.MEAN, tiny_imagenet.STD
    return Sources(
        *(parts[0], parts[1], len(names), mean, std), crop_padding=4, flip=True, names=tuple(names)
    )


def _custom(data: Data) -> Sources:
    """The user's own data set, from package.module:callable."""
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
    """Make sources of a user's training and test set; UsageError if they are no data sets.

    where: names the data set in errors. classes: number of classes; None: the training set's
    `classes`, or else one more than its largest label.
    """
    for part in parts:
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise UsageError(
                f"data.dataset {where} must return a data set with a length and items, got "
                f"{type(part).__name__}"
            )
        if not len(part):
            raise UsageError(f"data.dataset {where} returned a data set without samples")
    named = getattr(parts[0], "classes", None) if classes is None else classes
    if named is None:  # reads every item once
        labels = (label_of(parts[0], i, where) for i in range(len(parts[0])))
        classes = 1 + max(labels)
    else:
        classes = named if isinstance(named, int) else len(named)
    names = () if named is None or isinstance(named, int) else tuple(str(name) for name in named)
    sources = [ItemSource(part, classes, where) for part in parts]
    # Images of bytes are scaled to [-1, 1]; images of floats are not scaled.
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
"""Functions that open the data sets with a name."""
