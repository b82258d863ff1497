"""Opens the data set that the run file names.

    digits          scikit-learn's 1,797 handwritten digits, 8 x 8, from its package
    fashion-mnist   torchvision's, from data.root
    cifar10, cifar100          torchvision's, from data.root
    tiny-imagenet   its original folder layout, as downloaded (tiny_imagenet.py)
    image-folder    a folder with train/CLASS/*.jpg and val/CLASS/*.jpg (image_folder.py)
    imagenet        an image-folder with ImageNet's 1,000 classes
    huggingface     a data set of Hugging Face, from a folder or by name (hugging_face.py)
    webdataset      .tar shards (shards.py)
    package.module:callable    the user's own: called with `train: bool` and data.kwargs, returns a
                    map-style data set (own.py)

Not covered: data sets without a length; targets that are not class labels.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from switokd import plugins
from switokd.config.data_section import Data
from switokd.data import tiny_imagenet
from switokd.data.hugging_face import open_hugging_face
from switokd.data.image_folder import open_image_folder
from switokd.data.own import of_items
from switokd.data.scale import Scale
from switokd.data.shards import open_shards
from switokd.data.sources import ArraySource, ItemSource, Sources
from switokd.errors import UsageError, own_code_errors
from switokd.plugins import import_callable, is_object
from switokd.runtime.waiting import waiting


def open_sources(data: Data) -> Sources:
    """Open the data set; UsageError if it is missing, with the folder to put it in."""
    if is_object(data.dataset):
        lent = plugins.datasets(data.dataset)
        return of_items(
            (lent.train, lent.test), f"data.dataset {data.dataset}", data.keys, lent.classes
        )
    if ":" in data.dataset:
        return _custom(data)
    return BY_NAME[data.dataset](data)


def _digits_table() -> NDArray[np.float64]:
    """Read the digits as `[1797, 65]`: 64 pixels of 0 to 16, and the label.

    Read from scikit-learn's file, because its import takes a second in every rank.
    """
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if os.path.exists(file):
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

    try:
        with _downloading(name, data.root) if data.download else nullcontext():
            make = getattr(torchvision.datasets, name)
            return make(data.root, train=train, download=data.download)
    except (RuntimeError, OSError) as error:
        layout = {
            "FashionMNIST": "FashionMNIST/raw/train-images-idx3-ubyte (unpacked) and its siblings",
            "CIFAR10": "cifar-10-batches-py/",
            "CIFAR100": "cifar-100-python/",
        }[name]
        remedy = "" if data.download else ", or set data.download=true"
        raise UsageError(
            f"data.root: {name} is not in {Path(data.root).resolve()} ({error}); put "
            f"{layout} there{remedy}"
        ) from None


@contextmanager
def _downloading(name: str, root: str) -> Iterator[None]:
    """Let one rank of a machine download, because all share the folder; the others wait for it.

    The lock is in the folder: beside it, a pod may have nothing that it can write.
    """
    os.makedirs(root, exist_ok=True)
    lock = FileLock(os.path.join(root, ".download.lock"))
    with waiting(f"another process that downloads into {root} (it holds {lock.lock_file})"):
        lock.acquire()
    try:
        with waiting(f"the download of {name} into {root}"):
            yield
    finally:
        lock.release()


def _image_folder(data: Data) -> Sources:
    """Images by class in train/ and val/ or test/, augmented and scaled as usual for ImageNet."""
    scale = Scale.to(data.side)
    train_files, test_files, names = open_image_folder(
        data.root, data.allow_empty_classes, scale.train, scale.test
    )
    train = ItemSource(train_files, len(names), f"{data.root}, training")
    test = ItemSource(test_files, len(names), f"{data.root}, test")
    return scale.applied_to(Sources(train, test, len(names), (), (), names=tuple(names)))


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
    parts = [
        ItemSource(part, len(names), f"{part.root}, {kind}")
        for part, kind in ((train, "training"), (val, "test"))
    ]
    mean, std = tiny_imagenet.MEAN, tiny_imagenet.STD
    return Sources(
        *(parts[0], parts[1], len(names), mean, std), crop_padding=4, flip=True, names=tuple(names)
    )


def _custom(data: Data) -> Sources:
    """The user's own data set, from package.module:callable."""
    make = import_callable(data.dataset, "data.dataset")
    where = f"data.dataset {data.dataset}"
    with suppress(ValueError):  # some callables of C have no signature
        try:
            inspect.signature(make).bind(train=True, **data.kwargs)
        except TypeError as error:
            raise UsageError(
                f"{where} is called with train=True or False and data.kwargs {data.kwargs}: {error}"
            ) from None
    parts = []
    for train in (True, False):
        with own_code_errors(f"{where} with train={train}", __file__, every_rank=True):
            # A copy: what the first call changes in it must not reach the second one.
            parts.append(make(train=train, **copy.deepcopy(data.kwargs)))
    return of_items((parts[0], parts[1]), where, data.keys)


BY_NAME: dict[str, Callable[[Data], Sources]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar("CIFAR10", 10, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "cifar100": _cifar("CIFAR100", 100, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "tiny-imagenet": _tiny_imagenet,
    "image-folder": _image_folder,
    "imagenet": _imagenet,
    "huggingface": open_hugging_face,
    "webdataset": open_shards,
}
"""Functions that open the data sets with a name."""
