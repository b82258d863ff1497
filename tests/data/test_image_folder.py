"""Data sets of image files: image-folder and imagenet, intact and damaged.

Not covered: Tiny-ImageNet, which has its own layout (`test_tiny_imagenet.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from switokd.config.sections import Data
from switokd.data.images import open_images
from switokd.errors import UsageError
from tests.data.test_images import equal


def write_pictures(root: Path, parts: dict[str, list[str]], per_class: int = 4) -> Data:
    generator = np.random.default_rng(0)
    for part, classes in parts.items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return Data(dataset="image-folder", root=str(root), image_size=16, batch_size=4)


@pytest.mark.parametrize("test_folder", ["val", "test"])
def test_image_folder(tmp_path: Path, test_folder: str) -> None:
    data = write_pictures(tmp_path, {"train": ["ant", "bee"], test_folder: ["ant", "bee"]})
    images = open_images(data, seed=0)
    assert (images.shape, images.classes, images.samples) == ((3, 16, 16), 2, 8)
    (x, y), *rest = images.test()
    assert not rest
    assert y.tolist() == [0] * 4 + [1] * 4
    assert -2.2 < x.min() < x.max() < 2.7  # normalised with ImageNet's mean and std
    assert not equal(list(images.stream(2)), list(images.stream(4))[2:])
    assert equal(images.stream(4), open_images(data, seed=0).stream(4))


@pytest.mark.parametrize("damage", ["none", "short", "chunk", "gone"])
def test_message_for_a_damaged_image_names_the_file(damage: str, tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]})
    broken = tmp_path / "train" / "bee" / "1.png"
    whole = broken.read_bytes()
    at = whole.index(b"IDAT")
    broken.unlink()
    if damage == "gone":
        broken.symlink_to("nowhere.png")
    else:
        chunk = whole[:at] + bytes(4) + whole[at + 4 :]
        broken.write_bytes({"none": b"text", "short": whole[:300], "chunk": chunk}[damage])
    images = open_images(data, seed=0)
    with pytest.raises(UsageError) as caught:
        list(images.stream(3))
    assert str(caught.value).startswith(f"{broken} cannot be read: ")
    assert "\n" not in str(caught.value)


def test_data_root_that_is_a_file(tmp_path: Path) -> None:
    root = tmp_path / "data.zip"
    root.write_bytes(b"")
    data = Data(dataset="image-folder", root=str(root), image_size=16, batch_size=4)
    with pytest.raises(UsageError, match=r"data\.zip must hold train/CLASS/\.\.\. and val/CLASS"):
        open_images(data, seed=0)


def test_train_and_val_with_different_classes(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "cow"]})
    with pytest.raises(UsageError, match=r"train and val differ in classes: \['bee', 'cow'\]"):
        open_images(data, seed=0)


def test_imagenet_is_an_image_folder_with_1000_classes(tmp_path: Path) -> None:
    names = [f"n{i:04}" for i in range(1000)]
    data = write_pictures(tmp_path, {"train": names[:999], "val": names[:999]}, per_class=1)
    imagenet = data.model_copy(update={"dataset": "imagenet"})
    with pytest.raises(UsageError, match="has 999 classes, and imagenet has 1000"):
        open_images(imagenet, seed=0)
    write_pictures(tmp_path, {"train": names[999:], "val": names[999:]}, per_class=1)
    images = open_images(imagenet, seed=0)
    assert (images.shape, images.classes, images.samples) == ((3, 16, 16), 1000, 1000)
    assert images.sources.flip
