"""Pictures of any size, scaled to one size as usual for ImageNet.

Not covered: the modes of pictures, and how one is fitted (`pictures.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from switokd.data import pictures
from switokd.data.items import describe
from switokd.data.sources import Sources
from switokd.errors import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, by channel."""


@dataclass(frozen=True)
class Scale:
    """Transforms of RGB pictures to bytes `[3, side, side]`."""

    train: Callable[[Any], Any]
    """Crops a random part of random size."""
    test: Callable[[Any], Any]
    """Scales to `resize`, and crops the centre."""
    resize: int
    """Pixels of the shorter side before the centre is cropped."""

    @classmethod
    def to(cls, side: int) -> Scale:
        """Return the transforms to squares of this side."""
        from torchvision.transforms import v2

        resize = round(side * 8 / 7)
        to_tensor = v2.ToImage(), v2.ToDtype(torch.uint8)
        crop = v2.RandomResizedCrop(side, antialias=True)
        fit = partial(pictures.fit, resize=(resize, resize), crop=(side, side))
        return cls(v2.Compose([crop, *to_tensor]), v2.Compose([fit, *to_tensor]), resize)

    def of_any_mode(self) -> Scale:
        """Return transforms that take pictures of any mode."""
        from torchvision.transforms import v2

        train, test = (v2.Compose([_rgb, then]) for then in (self.train, self.test))
        return replace(self, train=train, test=test)

    def applied_to(self, sources: Sources) -> Sources:
        """Return sources whose items these transforms have made, with ImageNet's normalisation."""
        return replace(sources, mean=MEAN, std=STD, flip=True, resize=self.resize)


def _rgb(image: Any) -> Image.Image:
    """Return a picture in RGB, as `image-folder` reads files; UsageError if it is no picture."""
    if not isinstance(image, Image.Image):
        raise UsageError(f"data.image_size scales pictures, got {describe(image)}")
    return pictures.plain(image, channels=3)
