"""Image files are read with the same pixels as in a run's evaluation.

Not covered: predictions for them (`tests/export/test_predict.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from switokd.config.sections import Data
from switokd.data import pictures
from switokd.data.images import open_images
from switokd.data.signature import InputSignature
from switokd.errors import UsageError

SIZES = [(16, 16), (17, 31), (90, 40), (40, 90), (18, 18), (8, 200), (201, 199)]


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def greyscale(height: int, width: int) -> InputSignature:
    return InputSignature(
        channels=1,
        height=height,
        width=width,
        values="bytes",
        mean=(0.5,),
        std=(0.5,),
        resize=(height, width),
        labels=("a", "b"),
    )


def test_pixels_equal_those_of_the_runs_evaluation(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for i, (width, height) in enumerate(SIZES):
            folder = tmp_path / part / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            photograph(width, height, ("RGB", "L", "RGBA")[i % 3]).save(folder / f"{i}.png")
    data = Data(dataset="image-folder", root=str(tmp_path), image_size=16, batch_size=2)
    images = open_images(data, seed=0)
    signature = InputSignature.of(images)
    assert signature.labels == ("cat", "dog")
    assert (signature.shape, signature.resize) == ((3, 16, 16), (18, 18))
    mean, std = (np.array(v)[:, None, None] for v in (signature.mean, signature.std))
    (evaluated, _), *_ = images.test()
    assert len(evaluated) == len(SIZES)
    for path, expected in zip(pictures.find(tmp_path / "val"), evaluated.numpy(), strict=True):
        pixels = (pictures.read(path, signature) - mean) / std
        np.testing.assert_allclose(pixels, expected, atol=1e-5)


def test_image_of_the_right_size_keeps_its_pixels(tmp_path: Path) -> None:
    image = photograph(6, 5, "L")
    image.save(tmp_path / "a.png")
    pixels = pictures.read(tmp_path / "a.png", greyscale(5, 6))
    np.testing.assert_array_equal(pixels, np.asarray(image, dtype=np.float32)[None] / 255)


@pytest.mark.parametrize(("width", "height"), [(100, 10), (10, 100), (7, 7), (1, 1)])
def test_image_of_any_size_covers_the_crop(width: int, height: int) -> None:
    white = Image.new("L", (width, height), 255)
    pixels = pictures.prepare(white, greyscale(9, 12))
    assert pixels.shape == (1, 9, 12)
    assert pixels.min() == 1  # no black border


def test_images_of_16_bits_per_pixel_are_scaled(tmp_path: Path) -> None:
    deep = np.array([[0, 20_000], [40_000, 65_535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    pixels = pictures.read(tmp_path / "deep.png", greyscale(2, 2))
    np.testing.assert_allclose(pixels[0], deep / 65_535, atol=1 / 255)


def test_find_searches_subfolders_for_image_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("z.png", "a/x.JPG", "a/b/y.jpeg", "a/notes.txt"):
        (tmp_path / name).touch()
    files = [str(p.relative_to(tmp_path)) for p in pictures.find(tmp_path)]
    assert files == ["a/b/y.jpeg", "a/x.JPG", "z.png"]
    assert pictures.find(tmp_path / "a" / "notes.txt") == [tmp_path / "a" / "notes.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.png", b"no picture", "notes.png: cannot be read as a picture: Pillow does not"),
        ("empty.jpg", b"", "empty.jpg: cannot be read as a picture: Pillow does not"),
        ("half.png", None, "half.png: cannot be read as a picture: "),
    ],
)
def test_message_for_a_damaged_image_is_one_line(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is None:
        photograph(64, 64).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        pictures.read(path, greyscale(8, 8))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_message_for_an_empty_folder_and_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no picture in this folder"):
        pictures.find(tmp_path)
    with pytest.raises(UsageError, match="no such file or folder"):
        pictures.find(tmp_path / "none.png")
