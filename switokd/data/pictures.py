"""Picture files into the arrays that an artefact takes, as the run evaluated its test images.

Scaled, proportions kept, until the picture covers `InputSignature.resize`; then the middle is cut
out. A picture of the right size stays as it is.

Not covered: EXIF orientation (training ignores it as well), animations beyond their first frame.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from switokd.data.signature import InputSignature
from switokd.errors import UsageError

Floats = NDArray[np.float32]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
"""What counts as a picture in a folder; a file named by itself may be called anything."""


def find(path: Path) -> list[Path]:
    """The picture itself, or all pictures in a folder and below, sorted.

    UsageError if there is no such path, or no picture in the folder.
    """
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise UsageError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
        return found
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    return [path]


def read(path: Path, signature: InputSignature) -> Floats:
    """One picture file as `[C, H, W]`, values in [0, 1]; UsageError if it is none."""
    try:
        with Image.open(path) as image:
            image.load()
            return prepare(image, signature)
    except Exception as error:  # decoders fail in many ways
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["broken"])[0]
        if isinstance(error, UnidentifiedImageError):
            reason = "it is in no format that Pillow knows"
        raise UsageError(f"{path}: cannot be read as a picture: {reason}") from None


def prepare(image: Image.Image, signature: InputSignature) -> Floats:
    """A picture of any size and colour as `[C, H, W]`, C of 1 or 3, values in [0, 1]."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    image = image.convert("L" if signature.channels == 1 else "RGB")
    image = _middle(_covering(image, signature), signature)
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def _covering(image: Image.Image, signature: InputSignature) -> Image.Image:
    """Scaled so that it just covers `resize`; rounded as torchvision's Resize does."""
    (width, height), (least_height, least_width) = image.size, signature.resize
    if least_width * height >= least_height * width:
        size = least_width, max(int(least_width * height / width), least_height)
    else:
        size = max(int(least_height * width / height), least_width), least_height
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _middle(image: Image.Image, signature: InputSignature) -> Image.Image:
    """The middle of the network's size; rounded as torchvision's CenterCrop does."""
    left = round((image.width - signature.width) / 2)
    top = round((image.height - signature.height) / 2)
    return image.crop((left, top, left + signature.width, top + signature.height))
