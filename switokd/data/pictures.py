"""Turns any picture into bytes of grey or RGB, and fits it to a size.

Training, evaluation, `switokd predict` and Python all read pictures here, so that they see the
same pixels. The table in docs/data-and-networks.md says what becomes of each of Pillow's modes.

An image is scaled to cover a size, with its proportions kept. Then its centre is cropped. An image
of the right size is not changed.

Not covered: EXIF orientation, which torchvision ignores as well; colour profiles; animations beyond
the first frame; which files of a folder are pictures (`image_files.py`); what a network takes
(`network_input.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from switokd.data.image_files import why_missing
from switokd.errors import UsageError, first_line

GREY = ("1", "L", "LA")
"""Modes without colour, after `VIA`; the others of `PLAIN` have colour."""
PLAIN = (*GREY, "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
"""Modes that Pillow converts to L and RGB without loss of range; an alpha channel is left out."""
VIA = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA", "LAB": "RGB"}
"""Modes that need a step between. A palette's own transparency makes Pillow warn otherwise."""
BITS, INTERPRETATION, SAMPLE_FORMAT = 258, 262, 339
"""Tags of a TIFF file."""
WHITE_IS_ZERO, SIGNED = 0, 2
HOLD_16_BITS = ("PNG", "PPM")
"""Formats whose mode I holds 0 to 65,535. Older versions of Pillow read 16-bit PNG as mode I."""


def load(path: str | Path, channels: int | None) -> Image.Image:
    """Read a file's first frame as bytes, see `plain`; UsageError with the path if that fails."""
    try:
        # Given a path, Pillow maps some TIFF files into memory, and mixes up the turned ones.
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()
            return plain(image, channels)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise many kinds of errors
        raise UsageError(f"{path}: cannot be read as a picture: {_reason(path, error)}") from None


def plain(image: Image.Image, channels: int | None) -> Image.Image:
    """Return a picture of any mode as a new one of bytes: mode L or RGB.

    channels: 1 for grey, 3 for RGB; None: grey if the picture has no colour. 16-bit grey becomes
    value // 256; Pillow's own conversion would clip it at 255. UsageError for integers of 32 bits,
    signed ones and floats, because nothing tells which of their values is white.
    """
    is_signed = SIGNED in _tag(image, SAMPLE_FORMAT)
    has_16_bits = image.mode == "I" and image.format in HOLD_16_BITS
    if image.mode.startswith("I;16") or has_16_bits:
        image = Image.fromarray(_upper_bits(image))
    if image.mode in VIA:
        image = image.convert(VIA[image.mode])
    if image.mode not in PLAIN or is_signed:
        raise UsageError(
            f"a picture of mode {image.mode} has no known range of values"
            f"{', because they are signed' if is_signed else ''}; save it with 8 or 16 bits per "
            "channel, in grey or RGB"
        )
    is_grey = image.mode in GREY if channels is None else channels == 1
    return image.convert("L" if is_grey else "RGB")


def _tag(image: Image.Image, number: int) -> tuple[int, ...]:
    """Return a tag of a TIFF file's picture; empty if it has none, or is of another format."""
    value = getattr(image, "tag_v2", {}).get(number, ())
    return value if isinstance(value, tuple) else (value,)


def _upper_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Return the upper 8 bits of grey of 16 bits, or of 12 bits in a TIFF file.

    Pillow gives the numbers of these TIFF files as they are, also where 0 is white.
    """
    (bits,) = _tag(image, BITS)[:1] or (16,)
    values = np.asarray(image)
    if WHITE_IS_ZERO in _tag(image, INTERPRETATION):
        values = 2**bits - 1 - values
    upper: NDArray[np.uint8] = (values // 2 ** (bits - 8)).astype(np.uint8)
    return upper


def fit(image: Image.Image, resize: tuple[int, int], crop: tuple[int, int]) -> Image.Image:
    """Scale an image to just cover `resize`, then crop its centre; both are (height, width).

    Rounds like torchvision's Resize and CenterCrop.
    """
    (width, height), (min_height, min_width) = image.size, resize
    if min_width * height >= min_height * width:
        size = min_width, max(int(min_width * height / width), min_height)
    else:
        size = max(int(min_height * width / height), min_width), min_height
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    top, left = round((image.height - crop[0]) / 2), round((image.width - crop[1]) / 2)
    return image.crop((left, top, left + crop[1], top + crop[0]))


def _reason(path: str | Path, error: Exception) -> str:
    """Say why a file cannot be read, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "Pillow does not know its format, or it is damaged"
    if isinstance(error, FileNotFoundError):
        return why_missing(path)
    return getattr(error, "strerror", None) or first_line(error)
