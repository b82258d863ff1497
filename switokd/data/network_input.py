"""Prepares pictures for a network like the test images of its run.

Not covered: pixels of any mode, scaling and cropping (`pictures.py`); normalisation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from switokd.data import pictures
from switokd.data.signature import InputSignature

Floats = NDArray[np.float32]
"""Images or logits in float32."""


def read(path: Path, signature: InputSignature) -> Floats:
    """Read an image file as `[C, H, W]`, values in [0, 1]; UsageError if that fails."""
    return _prepared(pictures.load(path, signature.channels), signature)


def prepare(image: Image.Image, signature: InputSignature) -> Floats:
    """Turn an image of any size and colour into `[C, H, W]`, C = 1 or 3, values in [0, 1].

    UsageError for modes that `pictures.plain` refuses.
    """
    return _prepared(pictures.plain(image, signature.channels), signature)


def _prepared(image: Image.Image, signature: InputSignature) -> Floats:
    """Fit an image of mode L or RGB to the network; return `[C, H, W]`, values in [0, 1]."""
    image = pictures.fit(image, signature.resize, (signature.height, signature.width))
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)
