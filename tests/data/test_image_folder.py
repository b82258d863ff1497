"""Data sets of image files: image-folder and imagenet, intact and damaged.

Not covered: Tiny-ImageNet, which has its own layout (`test_tiny_imagenet.py`).
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from switokd.config.data_section import Data
from switokd.data.images import open_images
from switokd.data.sources import ItemSource
from switokd.errors import UsageError
from tests.data.test_image_files import LEFT_BEHIND, touch
from tests.data.test_images import equal


def write_pictures(root: Path, parts: dict[str, list[str]], per_class: int = 4) -> Data:
    generator = np.random.default_rng(0)
    for part, classes in parts.items():
        (root / part).mkdir(parents=True, exist_ok=True)
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
    assert str(caught.value).startswith(f"{broken}: cannot be read as a picture: ")
    assert str(caught.value).endswith("; replace or delete this file")
    assert "\n" not in str(caught.value)


def test_data_root_that_is_a_file(tmp_path: Path) -> None:
    root = tmp_path / "data.zip"
    root.write_bytes(b"")
    data = Data(dataset="image-folder", root=str(root), image_size=16, batch_size=4)
    with pytest.raises(UsageError, match=r"data\.zip must hold train/CLASS/\.\.\. and val/CLASS"):
        open_images(data, seed=0)


def message(data: Data) -> str:
    with pytest.raises(UsageError) as caught:
        open_images(data, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_train_and_val_with_different_classes(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "cow"]})
    assert message(data).endswith(
        "train and val differ in classes: only train has bee and only val has cow; "
        "give both the same class folders"
    )


def test_class_names_in_two_encodings_are_shown_apart(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": ["caf\u00e9"], "val": ["cafe\u0301"]})
    assert (
        r"only train has 'caf\xe9' and only val has 'cafe\u0301' (the same letters in another "
        "encoding: Unicode NFC and NFD)"
    ) in message(data)


def test_what_systems_leave_behind_changes_nothing(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]})
    before = open_images(data, seed=0)
    for folder in ("train", "val", "train/ant", "val/bee"):
        touch(tmp_path / folder, *LEFT_BEHIND)
    touch(tmp_path / "train", "loose.txt")
    after = open_images(data, seed=0)
    assert after.sources.names == ("ant", "bee")
    assert equal(after.stream(4), before.stream(4))
    assert equal(list(after.test()), list(before.test()))
    for_loader_processes = pickle.loads(pickle.dumps(after.view(train=True)))
    assert equal([for_loader_processes.batch([(0, 1)])], [after.view(train=True).batch([(0, 1)])])


def test_images_have_the_order_of_torchvision(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]}, per_class=1)
    for name in ("b/1", "b-c/1", "B/2", "10", "9", "b/a/3"):
        path = tmp_path / "train" / "ant" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9)).save(path)
    train = open_images(data, seed=0).sources.train
    assert isinstance(train, ItemSource)
    reference = ImageFolder(tmp_path / "train")
    paths = [str(tmp_path / "train" / file) for file in train.items.files]
    assert list(zip(paths, train.items.targets, strict=True)) == reference.samples


@pytest.mark.parametrize("part", ["train", "val"])
def test_empty_class_folders(part: str, tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]})
    for name in ("cow", "dog"):
        touch(tmp_path / part / name, ".DS_Store", "notes.txt")
        write_pictures(tmp_path, {"val" if part == "train" else "train": [name]})
    text = message(data)
    assert text.startswith(f"data.root: {tmp_path / part}: no image file (.png, ")
    assert text.endswith(
        "in 2 of 4 class folders: cow, dog; fill or delete them, or set "
        "data.allow_empty_classes=true"
    )
    images = open_images(data.model_copy(update={"allow_empty_classes": True}), seed=0)
    assert images.sources.names == ("ant", "bee", "cow", "dog")
    labels = {0, 1, 2, 3} if part == "val" else {0, 1}
    assert set(torch.cat([y for _, y in images.stream(8)]).tolist()) == labels


def test_class_without_a_test_folder(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": ["ant", "bee", "cow"], "val": ["bee", "cow"]})
    assert message(data).endswith(
        "only train has ant; give both the same class folders, or set data.allow_empty_classes=true"
    )
    images = open_images(data.model_copy(update={"allow_empty_classes": True}), seed=0)
    assert next(iter(images.test()))[1].tolist() == [1] * 4 + [2] * 4


def test_folders_without_images(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": [], "val": ["ant"]})
    touch(tmp_path / "train", "0.png", ".git/config")
    assert "train has no class folders; put the images of each class into" in message(data)
    (tmp_path / "train" / "ant").mkdir()
    for allow in (True, False):
        empty = data.model_copy(update={"allow_empty_classes": allow})
        assert message(empty).endswith("in 1 of 1 class folders: ant")


def test_folders_that_are_links_to_nothing(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, {"train": ["ant", "bee"], "test": ["ant", "bee"]})
    (tmp_path / "train" / "cow").symlink_to("gone")
    assert message(data) == (
        f"data.root: {tmp_path}/train/cow: it is a link to gone, which is not there; "
        "mend or delete the link"
    )
    (tmp_path / "val").symlink_to("gone-too")
    assert message(data).endswith("; val: it is a link to gone-too, which is not there")


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
