"""WebDataset's shards: the samples in their order, read by number; one-line errors."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from switokd.config.data_section import Data
from switokd.data.images import Batch, Images, open_images
from switokd.errors import OwnCodeError, UsageError

File = tuple[str, bytes]


def png(value: int, side: int = 8) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(content, "png")
    return content.getvalue()


def sample(i: int, **more: bytes) -> list[File]:
    files = {"png": png(i), "cls": str(i % 3).encode(), **more}
    return [(f"a/long name {i}.{suffix}", content) for suffix, content in files.items()]


def write(path: Path, files: Sequence[File], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as shard:  # type: ignore[call-overload]
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def shards(root: Path, train: str = "train/{}.tar", test: str = "val/{}.tar") -> str:
    """Write 12 training samples in three shards, and 5 test samples in one."""
    for n in range(3):
        files = [file for i in range(4 * n, 4 * n + 4) for file in sample(i)]
        write(root / train.format(n), [("a/.hidden", b"x"), *files])
    write(root / test.format(0), [file for i in range(5) for file in sample(i, json=b"{}")])
    return str(root)


def opened(root: str | Path, **settings: Any) -> Images:
    settings = {"batch_size": 4, **settings}
    return open_images(Data(dataset="webdataset", root=str(root), **settings), seed=0)


def values(batches: Iterable[Batch]) -> list[int]:
    """The byte of each image, whose pixels are all the same."""
    return [round(v * 127.5 + 127.5) for x, _ in batches for v in x[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize(
    ("train", "test", "kwargs"),
    [
        ("train/{}.tar", "val/{}.tar", {}),
        ("set-train-{}.tar", "set-validation-{}.tar", {}),
        ("a{}.tar", "b/{}.tar", {"train": "a?.tar", "test": "b/*.tar"}),
        ("a0{}.tar", "b/{}.tar", {"train": "a{00..02}.tar", "test": "b/{0..0}.tar"}),
    ],
)
def test_samples_of_shards(tmp_path: Path, train: str, test: str, kwargs: Any) -> None:
    images = opened(shards(tmp_path, train, test), kwargs=kwargs)
    assert (images.shape, images.classes, images.samples) == ((1, 8, 8), 3, 12)
    assert values(images.test()) == [0, 1, 2, 3, 4]
    assert torch.cat([y for _, y in images.test()]).tolist() == [0, 1, 2, 0, 1]
    assert sorted(values(images.stream(3))) == [*range(12)]


def test_samples_are_read_by_number_also_in_another_process(tmp_path: Path) -> None:
    view = opened(shards(tmp_path)).view(train=True)
    there = pickle.loads(pickle.dumps(view))
    positions = [(0, i) for i in (11, 0, 7, 4)]
    for one, other in zip(view.batch(positions), there.batch(positions), strict=True):
        assert torch.equal(one, other)
    assert view.batch(positions)[1].tolist() == [2, 0, 1, 1]


def test_arrays_keys_and_unused_files(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.full((2, 4, 4), 0.5, np.float32))
    files = [
        file
        for i in range(4)
        for file in [(f"{i}.x.npy", array.getvalue()), (f"{i}.json", json.dumps(i % 2).encode())]
    ]
    for part in ("train", "test"):
        write(tmp_path / part / "0.tar", files)
    with pytest.raises(
        UsageError, match=r"training sample 0: an item has x.npy, json; the image is"
    ):
        opened(tmp_path)
    images = opened(tmp_path, keys=("x.npy", "json"))
    assert (images.shape, images.classes) == ((2, 4, 4), 2)
    assert images.sources.notes == ()


def test_pictures_of_any_size_are_scaled(tmp_path: Path) -> None:
    files = [file for i in range(4) for file in sample(i, png=png(i, 8 + i), txt=b"hello")]
    for part in ("train", "test"):
        write(tmp_path / part / "0.tar", files)
    images = opened(tmp_path, image_size=8)
    assert (images.shape, images.sources.resize) == ((3, 8, 8), 9)
    (note,) = images.sources.notes
    assert note == f"data.root {tmp_path}: image png, label cls; not used: txt"


@pytest.mark.parametrize(
    ("fault", "settings", "sentence"),
    [
        (
            "",
            {"root": "nowhere"},
            "has no *.tar in train or training/, nor train or training in the ",
        ),
        (
            "",
            {"kwargs": {"test": "x-*.tar"}},
            "has no x-*.tar; name the shards with data.kwargs={tes",
        ),
        (
            "",
            {"kwargs": {"tests": "x"}},
            "data.kwargs: found tests; allowed for webdataset: train and",
        ),
        (
            "",
            {"keys": ("jpg", "cls")},
            "sample 0: data.keys: an item has no 'jpg'; it has png, cls",
        ),
        ("gz", {}, "9.tar cannot be read as an uncompressed .tar file"),
        ("twice", {}, "9.tar cannot be read as an uncompressed .tar file: x.cls is there twice"),
        (
            "no label",
            {},
            "training sample 12: an item has png; the image is png, the label is unkno",
        ),
        (
            "text",
            {},
            "training sample 12: the label must be a whole number, which is the number of",
        ),
        (
            "broken",
            {},
            "training sample 12: {}/train/9.tar: x.png cannot be read: Pillow does not know its fo",
        ),
        ("large", {}, "training sample 12: the label 99999999999999999999 is too large; number"),
        ("digits", {}, "training sample 12: the label must be a whole number, which is the numb"),
        ("", {"kwargs": {"test": "/x/*.tar"}}, "data.kwargs: test: '/x/*.tar' is no pattern of"),
        ("", {"kwargs": {"train": ""}}, "data.kwargs: train: '' is no pattern of file names"),
        ("", {"kwargs": {"train": "train/{0..3}.tar"}}, "has no train/3.tar, of train: train/{0"),
        ("", {"kwargs": {"test": "{0..9999999}.tar"}}, "names more than 1000000 shards"),
        ("cut", {}, "9.tar cannot be read as an uncompressed .tar file: unexpected end of data"),
    ],
)
def test_message_for_unusable_shards(
    tmp_path: Path, fault: str, settings: dict[str, Any], sentence: str
) -> None:
    root = shards(tmp_path)
    last = tmp_path / "train" / "9.tar"
    if fault == "gz":
        write(last, sample(12), "w:gz")
    if fault == "twice":
        write(last, [("x.png", png(1)), ("x.cls", b"1"), ("x.cls", b"2")])
    if fault == "no label":
        write(last, [("x.png", png(1))])
    if fault == "text":
        write(last, [("x.png", png(1)), ("x.cls", b"dog")])
    if fault == "large":
        write(last, [("x.png", png(1)), ("x.cls", b"9" * 20)])
    if fault == "digits":
        write(last, [("x.png", png(1)), ("x.cls", "\N{ARABIC-INDIC DIGIT TWO}".encode())])
    if fault == "broken":
        write(last, [("x.png", b"no picture"), ("x.cls", b"1")])
    if fault == "cut":
        write(last, [("x.cls", b"1"), ("x.png", png(1))])
        last.write_bytes(last.read_bytes()[:1600])
    with pytest.raises((UsageError, OwnCodeError)) as caught:
        list(opened(**{"root": root, **settings}).stream(4))
    assert sentence.replace("{}/", f"{root}/") in str(caught.value)
    assert "\n" not in str(caught.value)
