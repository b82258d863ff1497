"""Tiny-ImageNet as downloaded: a small synthetic data set in the original layout.

Not covered: the real images.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from switokd.config.data_section import Data
from switokd.data.images import Images, open_images
from switokd.data.tiny_imagenet import (
    MEAN,
    STD,
    TinyImageNet,
    open_tiny_imagenet,
)
from switokd.errors import UsageError
from switokd.models.registry import build
from tests.data.test_image_files import LEFT_BEHIND, touch
from tests.preloaded import train
from tests.support import lines

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

WNIDS = ["n02", "n01", "n03"]
"""Not sorted, as in the original."""
GREY = {"n01": 40, "n02": 120, "n03": 200}
"""Grey level of a class's images."""
BOX = "\t0\t32\t44\t62"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with tiny-imagenet-200/: 3 classes of 4 training images, and 6 validation images.

    One training image per class is greyscale. The grey level of an image tells its class.
    """
    top = tmp_path / "tiny-imagenet-200"
    for name in WNIDS:
        folder = top / "train" / name / "images"
        folder.mkdir(parents=True)
        (top / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG{BOX}\n")
        for i in range(4):
            picture(GREY[name], "L" if i == 0 else "RGB").save(folder / f"{name}_{i}.JPEG")
    val = top / "val"
    (val / "images").mkdir(parents=True)
    lines = []
    for i, name in enumerate(["n03", "n01", "n01", "n02", "n03", "n02"]):
        picture(GREY[name], "RGB").save(val / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{name}{BOX}\n")
    (val / "val_annotations.txt").write_text("".join(lines))
    (top / "test" / "images").mkdir(parents=True)
    (top / "wnids.txt").write_text("".join(f"{name}\n" for name in WNIDS))
    (top / "words.txt").write_text("n01\ta fish\n")
    return tmp_path


def picture(grey: int, mode: str, side: int = 64) -> Image.Image:
    return Image.fromarray(np.full((side, side), grey, np.uint8)).convert(mode)


def images(root: Path, workers: int = 0) -> Images:
    data = Data(dataset="tiny-imagenet", root=str(root), batch_size=4, workers=workers)
    return open_images(data, seed=0)


def test_images_have_the_label_of_their_class(root: Path) -> None:
    opened = images(root)
    assert (opened.shape, opened.classes, opened.samples) == ((3, 64, 64), 3, 12)
    labels = []
    for source, expected in ((opened.sources.train, 12), (opened.sources.test, 6)):
        x, y = source.fetch(range(expected), np.zeros(expected, np.uint64))
        assert (len(source), tuple(x.shape)) == (expected, (expected, 3, 64, 64))
        level = x.float().mean(dim=(1, 2, 3)).round().int().tolist()
        assert level == [list(GREY.values())[label] for label in y.tolist()]
        labels.append(y.tolist())
    assert labels == [[0] * 4 + [1] * 4 + [2] * 4, [2, 0, 0, 1, 2, 1]]


def test_what_systems_leave_behind_is_no_image(root: Path) -> None:
    top = root / "tiny-imagenet-200"
    for folder in (top / "train" / "n01" / "images", top / "val" / "images"):
        touch(folder, *LEFT_BEHIND, "._n01_0.JPEG")
    opened = images(root)
    assert (len(opened.sources.train), len(opened.sources.test)) == (12, 6)


def test_data_root_may_be_the_folder_itself(root: Path) -> None:
    *parts, classes = open_tiny_imagenet(str(root / "tiny-imagenet-200"))
    assert classes == ["n01", "n02", "n03"]
    assert [len(part) for part in parts if isinstance(part, TinyImageNet)] == [12, 6]


def test_images_are_normalised_cropped_and_mirrored(root: Path) -> None:
    opened = images(root)
    (x, y), *_ = opened.test(batch_size=6)
    for pixels, label in zip(x, y.tolist(), strict=True):
        level = list(GREY.values())[label] / 255
        for channel in range(3):
            expected = (level - MEAN[channel]) / STD[channel]
            assert pixels[channel].mean().item() == pytest.approx(expected, abs=0.01)
    black = (0 - MEAN[0]) / STD[0]
    x, _ = next(opened.stream(1))
    assert (x[:, 0] < black + 0.01).any()  # padding at the border
    view = opened.view(train=True)
    assert (view.crop_padding, view.flip) == (4, True)


def test_pixels_do_not_depend_on_loader_processes(root: Path) -> None:
    alone, helped = images(root, workers=0), images(root, workers=1)
    for (x, y), (x_, y_) in zip(alone.stream(6), helped.stream(6), strict=True):
        assert x.equal(x_)
        assert y.equal(y_)
    assert len(pickle.dumps(alone.sources.train)) < 10_000  # paths, not pixels


def test_recipe_trains(root: Path) -> None:
    settings = [f"data.root={root}", "data.batch_size=4", "schedule.max_steps=3", "data.workers=0"]
    one_process = ["placement=replicated", "coordinator=off"]
    folder = train(root, 1, "tiny-imagenet-wrn-1t1s", *settings, *one_process)
    assert [line["n"] for line in lines(folder / "decisions.jsonl")] == [4, 4, 4]
    metrics = lines(folder / "metrics.jsonl")
    assert [m["network"] for m in metrics] == ["teacher", "student"]
    state = torch.load(folder / "weights" / "student.pt", weights_only=True)
    build("resnet-20", in_channels=3, num_classes=3).load_state_dict(state)


def without_wnids(top: Path) -> None:
    (top / "wnids.txt").unlink()


def with_empty_wnids(top: Path) -> None:
    (top / "wnids.txt").write_text("\n")


def without_a_class(top: Path) -> None:
    with (top / "wnids.txt").open("a") as wnids:
        wnids.write("n04\n")


def without_annotations(top: Path) -> None:
    (top / "val" / "val_annotations.txt").unlink()


def with_a_foreign_class(top: Path) -> None:
    (top / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\tn09{BOX}\n")


def without_a_tab(top: Path) -> None:
    (top / "val" / "val_annotations.txt").write_text("val_0.JPEG n01\n")


def without_an_image(top: Path) -> None:
    (top / "val" / "images" / "val_3.JPEG").unlink()


def with_half_an_image(top: Path) -> None:
    path = top / "val" / "images" / "val_0.JPEG"
    path.write_bytes(path.read_bytes()[:300])


def with_a_large_image(top: Path) -> None:
    picture(3, "RGB", side=80).save(top / "val" / "images" / "val_0.JPEG")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_wnids, "holds no tiny-imagenet-200/ with wnids.txt, train/ and val/"),
        (with_empty_wnids, "wnids.txt is empty"),
        (without_a_class, "class n04 of wnids.txt has no images in train/n04/images"),
        (without_annotations, "val_annotations.txt is not there; it lists the classes"),
        (with_a_foreign_class, "val_annotations.txt, line 1: 'n09' is not a class of wnids.txt"),
        (without_a_tab, "val_annotations.txt, line 1: '' is not a class"),
        (without_an_image, "val_annotations.txt, line 4: 'val_3.JPEG' is not in val/images"),
        (with_half_an_image, "val_0.JPEG: cannot be read as a picture: "),
        (with_a_large_image, "val_0.JPEG: an image of 80 x 80 pixels, where Tiny-ImageNet has 64"),
    ],
)
def test_message_for_missing_or_damaged_files_is_one_line(
    root: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(root / "tiny-imagenet-200")
    with pytest.raises(UsageError) as caught:
        images(root)
    message = str(caught.value)
    assert sentence in message
    assert str(root) in message
    assert "\n" not in message


def test_message_for_an_empty_data_root(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unpack tiny-imagenet-200\.zip there"):
        images(tmp_path)
