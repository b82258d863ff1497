"""What is known of a data set without its files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from switokd.config.data_section import DATASETS, Data
from switokd.data.catalog import check_present, missing_folders
from switokd.data.named import BY_NAME
from switokd.errors import UsageError


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        ("cifar10", "there is no folder none/cifar-10-batches-py; put it there, or set data.down"),
        ("fashion-mnist", "fashion-mnist is not in "),
        ("tiny-imagenet", "none/tiny-imagenet-200; put it there"),
        ("image-folder", "/none; name one that holds train/CLASS/... and val/CLASS/..."),
        ("imagenet", "data.root: there is no folder "),
        ("webdataset", "/none; name one that holds .tar shards in train/ and val/"),
    ],
)
def test_a_missing_data_set(
    dataset: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(problem)):
        check_present(Data(dataset=dataset, root="none"))


def test_data_sets_that_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "tiny-imagenet-200").mkdir()
    settings: dict[str, dict[str, Any]] = {
        "digits": {"root": "none"},
        "cifar10": {"root": str(tmp_path)},
        "cifar100": {"root": "none", "download": True},
        "tiny-imagenet": {"root": str(tmp_path / "tiny-imagenet-200")},
        "image-folder": {"root": str(tmp_path)},
        "huggingface": {"root": "owner/name"},
        "mine:data": {"root": "none"},
    }
    for dataset, values in settings.items():
        data = Data(dataset=dataset, **values)
        check_present(data)
        assert not missing_folders(data) or data.download


def test_every_name_of_a_data_set_can_be_opened() -> None:
    assert set(DATASETS) == set(BY_NAME)
