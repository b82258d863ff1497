"""Data sets of Hugging Face from a folder: splits, columns, labels, images.

Not covered: the hub.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from switokd.config.data_section import Data
from switokd.data.hugging_face import Rows
from switokd.data.images import Images, open_images
from switokd.data.sources import ItemSource
from switokd.errors import UsageError


@pytest.fixture(scope="module")
def datasets() -> Any:
    if importlib.util.find_spec("datasets") is None:
        missing = "datasets is not installed (pip install datasets)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import datasets

        yield datasets


def picture(i: int, side: int = 8) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), 10 * i, np.uint8))


@pytest.fixture(scope="module")
def rows(datasets: Any) -> Any:
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog", "cow"]),
            "image": datasets.Image(),
        }
    )
    columns = {
        "id": [f"n{i}" for i in range(12)],
        "label": [i % 2 for i in range(12)],
        "image": [picture(i) for i in range(12)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def save(datasets: Any, root: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(root))
    return str(root)


def opened(root: str, **settings: Any) -> Images:
    settings = {"batch_size": 4, **settings}
    return open_images(Data(dataset="huggingface", root=root, **settings), seed=0)


def test_a_saved_data_set(datasets: Any, rows: Any, tmp_path: Path) -> None:
    root = save(datasets, tmp_path, train=rows, test=rows.select(range(5)))
    images = opened(root)
    assert (images.shape, images.classes, images.samples) == ((3, 8, 8), 3, 12)
    assert images.sources.names == ("cat", "dog", "cow")
    x, y = next(iter(images.test()))
    assert y.tolist() == [0, 1, 0, 1, 0]
    bytes_ = [10.0 * i for i in range(5)]
    assert x[:, 0, 0, 0].tolist() == pytest.approx([b / 127.5 - 1 for b in bytes_], abs=1e-6)
    assert images.sources.notes == (
        f"data.root {root}: trains on the split train, evaluates on test",
        f"data.root {root}: image image, label label; not used: id",
    )
    view = images.view(train=True)
    there = pickle.loads(pickle.dumps(view))  # as for a loader process
    assert torch.equal(view.batch([(0, 5), (0, 2)])[0], there.batch([(0, 5), (0, 2)])[0])


def test_labels_are_checked_without_the_images(datasets: Any, rows: Any, tmp_path: Path) -> None:
    hidden = rows.select(range(4)).map(lambda row: {"label": -1})
    root = save(datasets, tmp_path, train=rows, validation=rows.select(range(4)), test=hidden)
    assert "evaluates on validation" in opened(root).sources.notes[0]
    with pytest.raises(UsageError, match=r"test sample 0: label -1 is outside the 3 classes"):
        opened(root, kwargs={"test": "test"})
    source = opened(root).sources.train
    assert isinstance(source, ItemSource)
    assert isinstance(source.items, Rows)
    assert source.items.targets.tolist() == [i % 2 for i in range(12)]


def test_numbers_in_columns_of_any_name(datasets: Any, tmp_path: Path) -> None:
    columns = {"pixels": [[[i, 2], [3, 4]] for i in range(6)], "kind": [i % 3 for i in range(6)]}
    rows = datasets.Dataset.from_dict(columns)
    for split in ("train", "test"):  # one folder per split, without a DatasetDict
        rows.save_to_disk(str(tmp_path / split))
    with pytest.raises(
        UsageError, match="an item has pixels, kind; the image is pixels, the label"
    ):
        opened(str(tmp_path))
    images = opened(str(tmp_path), keys=("pixels", "kind"))
    assert (images.shape, images.classes) == ((1, 2, 2), 3)


def test_pictures_of_any_size_are_scaled(datasets: Any, tmp_path: Path) -> None:
    columns = {"img": [picture(i, 8 + i) for i in range(4)], "label": [0, 1, 0, 1]}
    rows = datasets.Dataset.from_dict(columns).cast_column("img", datasets.Image())
    root = save(datasets, tmp_path, train=rows, test=rows)
    with pytest.raises(UsageError, match=r"images of one batch differ: .* data\.image_size"):
        list(opened(root).test())
    images = opened(root, image_size=8)
    assert (images.shape, images.sources.resize, images.sources.flip) == ((3, 8, 8), 9, True)
    assert next(images.stream(1))[0].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("splits", "settings", "sentence"),
    [
        (
            ["train"],
            {},
            "has no split validation or valid or val or dev or test; its splits are tr",
        ),
        (
            ["train", "test"],
            {"kwargs": {"train": "all"}},
            "has no split all; its splits are train,",
        ),
        ([], {}, "is one set without splits; save a DatasetDict with train and test"),
        (["text"], {}, "are text; save the data set after class_encode_column('label')"),
        (["missing"], {}, "Hugging Face's datasets cannot open it: "),
    ],
)
def test_message_for_an_unusable_data_set(
    datasets: Any, rows: Any, tmp_path: Path, splits: list[str], settings: Any, sentence: str
) -> None:
    root = str(tmp_path)
    if splits == ["text"]:
        text = datasets.Dataset.from_dict({"x": [[[1]]] * 4, "label": ["a"] * 4})
        save(datasets, tmp_path, train=text, test=text)
    elif splits == ["missing"]:
        root = str(tmp_path / "nothing")
    elif splits:
        save(datasets, tmp_path, **dict.fromkeys(splits, rows))
    else:
        rows.save_to_disk(root)
    with pytest.raises(UsageError) as caught:
        opened(root, **settings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_message_if_datasets_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match=r"datasets is not installed; pip install datasets, or swito"
    ):
        opened("nowhere")
