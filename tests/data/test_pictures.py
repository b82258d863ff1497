"""Pictures of every mode and format: the same pixels in training, evaluation and `predict`.

Not covered: predictions (`tests/export/test_predict.py`); finding files (`test_image_files.py`).
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from switokd.config.data_section import Data
from switokd.data import image_files, network_input, pictures
from switokd.data.images import open_images
from switokd.data.signature import InputSignature
from switokd.data.sources import ItemSource
from switokd.errors import UsageError
from tests.support import REPOSITORY

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
    for path, expected in zip(image_files.find(tmp_path / "val"), evaluated.numpy(), strict=True):
        pixels = (network_input.read(path, signature) - mean) / std
        np.testing.assert_allclose(pixels, expected, atol=1e-5)


def test_image_of_the_right_size_keeps_its_pixels(tmp_path: Path) -> None:
    image = photograph(6, 5, "L")
    image.save(tmp_path / "a.png")
    pixels = network_input.read(tmp_path / "a.png", greyscale(5, 6))
    np.testing.assert_array_equal(pixels, np.asarray(image, dtype=np.float32)[None] / 255)


@pytest.mark.parametrize(("width", "height"), [(100, 10), (10, 100), (7, 7), (1, 1)])
def test_image_of_any_size_covers_the_crop(width: int, height: int) -> None:
    white = Image.new("L", (width, height), 255)
    pixels = network_input.prepare(white, greyscale(9, 12))
    assert pixels.shape == (1, 9, 12)
    assert pixels.min() == 1  # no black border


def solid(mode: str, value: int | float | tuple[int, ...]) -> Image.Image:
    return Image.new(mode, (30, 20), value)


def sixteen_bits(mode: str, dtype: str) -> Image.Image:
    return Image.frombytes(mode, (30, 20), np.full(600, 40_000, dtype).tobytes())


COLOUR = (10, 100, 200)
RED = (200, 30, 10)


def with_palette(transparency: int | bytes | None) -> Image.Image:
    """A picture with a palette, in COLOUR; its index is 3."""
    image = solid("P", 3)
    image.putpalette([0] * 9 + list(COLOUR))
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


BLUE = with_palette(None).convert("RGB")
MODES: dict[str, tuple[Image.Image, tuple[int, ...] | int]] = {
    "1": (solid("1", 1), 255),
    "L": (solid("L", 100), 100),
    "I;16": (sixteen_bits("I;16", "<u2"), 156),
    "I;16L": (sixteen_bits("I;16L", "<u2"), 156),
    "I;16B": (sixteen_bits("I;16B", ">u2"), 156),
    "P": (with_palette(None), COLOUR),
    "PA": (with_palette(None).convert("PA"), COLOUR),
    "RGB": (BLUE, COLOUR),
    "RGBX": (BLUE.convert("RGBX"), COLOUR),
    "LA": (solid("LA", (100, 0)), 100),
    "La": (solid("LA", (100, 255)).convert("La"), 100),
    "RGBA": (solid("RGBA", (*COLOUR, 0)), COLOUR),
    "RGBa": (solid("RGBA", (*COLOUR, 255)).convert("RGBa"), COLOUR),
    "CMYK": (solid("CMYK", (255, 0, 0, 0)), (0, 255, 255)),
    "YCbCr": (solid("YCbCr", (100, 128, 128)), (100, 100, 100)),
    "HSV": (solid("HSV", (0, 255, 255)), (255, 0, 0)),
    "LAB": (solid("LAB", (255, 128, 128)), (255, 255, 255)),
}
"""By mode: a picture of one colour, and the bytes that it becomes; one number is for grey."""
REFUSED = {"I": solid("I", 40_000), "F": solid("F", 0.5)}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_bytes_of_grey_or_rgb(mode: str) -> None:
    image, expected = MODES[mode]
    assert image.mode == mode
    before = image.tobytes()
    is_grey = isinstance(expected, int)
    own, rgb = pictures.plain(image, None), pictures.plain(image, 3)
    assert (own.mode, rgb.mode) == ("L" if is_grey else "RGB", "RGB")
    atol = 1 if mode == "LAB" else 0
    np.testing.assert_allclose(np.asarray(own)[19, 29], expected, atol=atol)
    in_colour = np.broadcast_to(expected, 3)
    np.testing.assert_allclose(np.asarray(rgb)[0, 0], in_colour, atol=atol)
    assert pictures.plain(image, 1).mode == "L"
    assert image.tobytes() == before


@pytest.mark.parametrize("mode", REFUSED)
def test_modes_without_a_known_range_are_refused(mode: str, tmp_path: Path) -> None:
    REFUSED[mode].save(tmp_path / "a.tif")
    for channels in (1, 3, None):
        with pytest.raises(UsageError) as caught:
            pictures.load(tmp_path / "a.tif", channels)
        assert str(caught.value).startswith(f"{tmp_path / 'a.tif'}: a picture of mode {mode} has ")
        assert "save it with 8 or 16 bits" in str(caught.value)
    items = ItemSource([(REFUSED[mode], 0)], classes=1, where="mine")
    with pytest.raises(UsageError, match=f"^mine sample 0: a picture of mode {mode} has no"):
        items.fetch([0], np.zeros(1, np.uint64))


def test_document_names_every_mode() -> None:
    text = (REPOSITORY / "docs" / "data-and-networks.md").read_text(encoding="utf-8")
    table = text.split("| Pillow's mode |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([^`]+)`", table)) == {*MODES, *REFUSED}


VIDEO_TIFF = "video-colours.tif"
FILES: dict[str, tuple[Image.Image, tuple[int, ...] | int]] = {
    "one-bit.png": MODES["1"],
    "grey.png": MODES["L"],
    "grey.tif": MODES["L"],
    "deep.png": MODES["I;16"],
    "deep.tif": MODES["I;16"],
    "deep-big-endian.tif": MODES["I;16B"],
    "deep.pgm": MODES["I;16"],  # Pillow reads it as mode I
    "palette.png": MODES["P"],
    "palette-one-transparent.png": (with_palette(3), COLOUR),
    "palette-many-transparent.png": (with_palette(b"\xff\x80\x40\x00"), COLOUR),
    "palette.GIF": (with_palette(3), COLOUR),
    "grey-alpha.png": MODES["LA"],
    "alpha.png": MODES["RGBA"],
    "alpha.tif": MODES["RGBA"],
    "colour.bmp": MODES["RGB"],
    "colour.ppm": MODES["RGB"],
    "colour.webp": MODES["RGB"],
    "four-colours.tif": MODES["CMYK"],
    "four-colours.jpg": MODES["CMYK"],
    VIDEO_TIFF: MODES["YCbCr"],
    "upper.JPG": MODES["L"],
}


def reads_video_tiff(folder: Path) -> bool:
    """Return whether Pillow reads what it has written; releases before 13 call it truncated."""
    path = folder / VIDEO_TIFF
    try:
        FILES[VIDEO_TIFF][0].save(path)
        with Image.open(path) as image:
            image.load()
    except OSError:
        return False
    finally:
        path.unlink()
    return True


def save(image: Image.Image, path: Path) -> None:
    """Save a picture; Pillow before 10.3 cannot write one of 16 bits as PGM."""
    if path.suffix == ".pgm":
        header = f"P5 {image.width} {image.height} 65535\n".encode()
        path.write_bytes(header + np.asarray(image).astype(">u2").tobytes())
    else:
        image.save(path)


def test_training_evaluation_and_predict_see_the_same_pixels(tmp_path: Path) -> None:
    files = {
        name: FILES[name] for name in FILES if name != VIDEO_TIFF or reads_video_tiff(tmp_path)
    }
    for name, (image, _) in files.items():
        for part in ("train", "val"):
            folder = tmp_path / part / name.replace(".", "-")  # a class of its own
            folder.mkdir(parents=True)
            save(image, folder / name)
    data = Data(dataset="image-folder", root=str(tmp_path), image_size=8, batch_size=2)
    images = open_images(data, seed=0)
    names = sorted(files, key=lambda name: name.replace(".", "-"))
    signature = InputSignature.of(images)
    keys = np.zeros(len(files), dtype=np.uint64)
    (train, _), (test, _) = (
        source.fetch(range(len(files)), keys)
        for source in (images.sources.train, images.sources.test)
    )
    for name, trained, tested in zip(names, train.numpy(), test.numpy(), strict=True):
        value = FILES[name][1]
        expected = np.broadcast_to(np.reshape(value, (-1, 1, 1)), (3, 8, 8))
        atol = 2 if name == "colour.webp" or name.endswith("jpg") else 0
        np.testing.assert_allclose(trained, expected, atol=atol, err_msg=name)
        np.testing.assert_array_equal(trained, tested, err_msg=name)
        path = tmp_path / "val" / name.replace(".", "-") / name
        predicted = network_input.read(path, signature)
        np.testing.assert_array_equal(predicted, tested.astype(np.float32) / 255, err_msg=name)
        with Image.open(path) as image:  # from Python, as a picture
            np.testing.assert_array_equal(network_input.prepare(image, signature), predicted)
            own, _ = ItemSource([(image, 0)], 1, "mine").fetch([0], keys[:1])
        assert own.shape == (1, 1 if isinstance(value, int) else 3, 20, 30), name
        assert own[0, :, 0, 0].tolist() == trained[: own.shape[1], 0, 0].tolist(), name


def test_grey_of_16_bits_is_divided_by_256(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (9, 7), dtype=np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        save(Image.fromarray(values), tmp_path / name)
        pixels = pictures.load(tmp_path / name, channels=1)
        np.testing.assert_array_equal(np.asarray(pixels), values // 256)


def tiff(path: Path, bits: int, content: bytes, interpretation: int = 1, kind: int = 1) -> Path:
    """Write a grey picture of 2 x 2 pixels; kind: 1 for unsigned numbers, 2 for signed ones."""
    tags = {256: 2, 257: 2, 258: bits, 259: 1, 262: interpretation, 273: 134, 277: 1, 278: 2}
    tags |= {279: len(content), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    path.write_bytes(head + entries + bytes(4) + content)
    return path


@pytest.mark.parametrize(
    ("bits", "content", "interpretation", "expected"),
    [
        (12, bytes.fromhex("000fff 800010"), 1, [0, 255, 128, 1]),
        (16, struct.pack("<4H", 0, 65_535, 32_768, 256), 1, [0, 255, 128, 1]),
        (16, struct.pack("<4H", 0, 65_535, 32_768, 256), 0, [255, 0, 127, 254]),
        (8, bytes([0, 255, 128, 1]), 0, [255, 0, 127, 254]),
    ],
)
def test_tiff_files_of_any_depth_with_white_as_zero_or_not(
    bits: int, content: bytes, interpretation: int, expected: list[int], tmp_path: Path
) -> None:
    path = tiff(tmp_path / "a.tif", bits, content, interpretation)
    assert np.asarray(pictures.load(path, channels=1)).flatten().tolist() == expected


def test_signed_numbers_are_refused(tmp_path: Path) -> None:
    for bits in (8, 16):
        path = tiff(tmp_path / "a.tif", bits, bytes(bits // 2), kind=2)
        with pytest.raises(UsageError, match=r"a\.tif: .* because they are signed"):
            pictures.load(path, channels=1)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif", "a.png"])
def test_first_frame_of_an_animation_is_read(name: str, tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), COLOUR)
    first.save(tmp_path / name, save_all=True, append_images=[second])
    pixels = np.asarray(pictures.load(tmp_path / name, channels=3))
    np.testing.assert_allclose(pixels[4, 4], RED, atol=4)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.tif"])
def test_exif_orientation_is_not_applied_except_by_pillow_to_tiff(
    name: str, mode: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    image = Image.linear_gradient("L").resize((16, 24)).convert(mode)
    image.save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as saved:
        assert saved.getexif()[ExifTags.Base.Orientation] == 6
    if name == "a.tif":
        image = image.transpose(Image.Transpose.ROTATE_270)
    pixels = pictures.load(tmp_path / name, channels=3)
    assert pixels.size == image.size
    np.testing.assert_allclose(np.asarray(pixels), np.asarray(image.convert("RGB")), atol=12)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.bmp", "a.webp", "a.ppm"])
def test_truncated_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    photograph(64, 64).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError) as caught:
        pictures.load(path, channels=3)
    assert str(caught.value).startswith(f"{path}: cannot be read as a picture: ")
    assert "\n" not in str(caught.value)


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
        network_input.read(path, greyscale(8, 8))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
