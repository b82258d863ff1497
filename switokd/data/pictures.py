"""Reads image files as arrays for an artefact, prepared like the run's test images.

An image is scaled to cover `InputSignature.resize`, with its proportions kept. Then the centre is
cropped. An image of the right size is not changed.

Not covered: EXIF orientation, which training ignores as well; animations beyond the first frame.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from switokd.data.signature import InputSignature
from switokd.errors import UsageError

Floats = NDArray[np.float32]
"""Images or logits in float32."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of image files in a folder; a file that the user names may have any suffix."""


def find(path: Path) -> list[Path]:
    """Return the file itself, or all image files in a folder and its subfolders, sorted.

    UsageError if the path does not exist, or the folder has no image files.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UsageError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
        return files
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    return [path]


def read(path: Path, signature: InputSignature) -> Floats:
    """Read an image file as `[C, H, W]`, values in [0, 1]; UsageError if that fails."""
    try:
        with Image.open(path) as image:
            image.load()
            return prepare(image, signature)
    except Exception as error:  # decoders raise many kinds of errors
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["broken"])[0]
        if isinstance(error, UnidentifiedImageError):
            reason = "Pillow does not know its format"
        raise UsageError(f"{path}: cannot be read as a picture: {reason}") from None


def prepare(image: Image.Image, signature: InputSignature) -> Floats:
    """Turn an image of any size and colour into `[C, H, W]`, C = 1 or 3, values in [0, 1]."""
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow's convert would clip them at 255
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    image = image.convert("L" if signature.channels == 1 else "RGB")
    image = _crop_centre(_resize_to_cover(image, signature), signature)
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def _resize_to_cover(image: Image.Image, signature: InputSignature) -> Image.Image:
    """Scale an image to just cover `resize`, with the rounding of torchvision's Resize."""
    (width, height), (min_height, min_width) = image.size, signature.resize
    if min_width * height >= min_height * width:
        size = min_width, max(int(min_width * height / width), min_height)
    else:
        size = max(int(min_height * width / height), min_width), min_height
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _crop_centre(image: Image.Image, signature: InputSignature) -> Image.Image:
    """Crop the centre in the network's size, with the rounding of torchvision's CenterCrop."""
    left = round((image.width - signature.width) / 2)
    top = round((image.height - signature.height) / 2)
    return image.crop((left, top, left + signature.width, top + signature.height))
