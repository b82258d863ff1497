"""The section `data` of a run file. The docstring below a setting is its documentation.

Not covered: opening the data set (`data/named.py`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from switokd.config.base import Fraction, KeyText, NonNegative, Section
from switokd.errors import nearest

DATASETS = (
    *("digits", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet"),
    *("image-folder", "huggingface", "webdataset"),
)
"""Data sets with a name; `data/named.py` opens them."""


def _check_keys(value: Any) -> Any:
    """Return two different keys as a tuple, or None; ValueError otherwise, in one line."""
    if value is None:
        return None
    keys = tuple(value) if isinstance(value, list | tuple) else ()
    are_keys = all(isinstance(k, int | str) and k != "" and not isinstance(k, bool) for k in keys)
    if len(keys) != 2 or keys[0] == keys[1] or not are_keys:
        raise ValueError("two different keys or positions, such as [image, label] or [0, 2]")
    return keys


class Data(Section):
    """The data set, its batches and its augmentation."""

    dataset: KeyText = "digits"
    """The data set: digits, fashion-mnist, cifar10, cifar100, tiny-imagenet, imagenet,
    image-folder, huggingface, webdataset, or package.module:callable for your own."""
    root: str = "data"
    """Folder that holds the data set; digits needs none; huggingface also takes a name."""
    download: bool = False
    """Let torchvision download a missing data set into root."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images per step; every network trains on all of them."""
    crop_padding: Annotated[int, Field(ge=0)] | None = None
    """Pixels of padding before a random crop of the original size; null: the data set's usual."""
    flip: bool | None = None
    """Mirror every image at random, left to right; null: as usual for the data set."""
    label_smoothing: Fraction = 0.0
    """Share of every target that is spread evenly over all classes; 0: none."""
    mixup: NonNegative = 0.0
    """Blend every image with another of its batch, by a share from Beta(mixup, mixup); 0: off."""
    cutmix: NonNegative = 0.0
    """Paste a box of another image, with an area from Beta(cutmix, cutmix), into every image;
    0: off. With mixup as well, every image gets one of the two at random."""
    image_size: Annotated[int, Field(ge=8, le=16_384)] | None = None
    """Side, in pixels, of the square images of image-folder, imagenet, huggingface and webdataset;
    null: 224 for the first two, the images' own size for the others."""
    allow_empty_classes: bool = False
    """Let a class of image-folder or imagenet have no training or no test images."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Loader processes per rank; 0: the rank loads itself. The images stay the same."""
    train_samples: Annotated[int, Field(ge=2)] | None = None
    """Number of training images to use, the same ones for every seed; null: all."""
    drop_last: bool = True
    """Leave out the last batch of an epoch if it is smaller than batch_size."""
    keys: Annotated[tuple[KeyText | int, KeyText | int] | None, BeforeValidator(_check_keys)] = None
    """Where an item of your own data set, huggingface or webdataset has its image and its label:
    two keys, attributes or positions, such as [image, label] or [0, 2]; null: by common names, or
    the first two positions."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments for the callable of your own data set; for huggingface and webdataset,
    see docs/data-and-networks.md."""

    @property
    def side(self) -> int:
        """Side of the square images of image-folder and imagenet."""
        return self.image_size or 224

    @property
    def has_soft_targets(self) -> bool:
        """Whether targets are distributions over the classes instead of labels."""
        return self.label_smoothing > 0 or self.mixup > 0 or self.cutmix > 0

    @field_validator("dataset")
    @classmethod
    def _check_dataset(cls, name: str) -> str:
        if ":" not in name and name not in DATASETS:
            known = f"{', '.join(DATASETS)}, or package.module:callable"
            raise ValueError(f"{known}{nearest(name, DATASETS)}")
        return name

    @model_validator(mode="after")
    def _check_items(self) -> Data:
        has_items = ":" in self.dataset or self.dataset in ("huggingface", "webdataset")
        for setting in ("kwargs", "keys"):
            if getattr(self, setting) and not has_items:
                raise ValueError(
                    f"{setting} are for a dataset of your own, named as package.module:callable, "
                    "and for huggingface and webdataset"
                )
        return self
