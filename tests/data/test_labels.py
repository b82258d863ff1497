"""Labels outside the classes give a one-line error before the training starts.

Not covered: errors of other invalid samples (`test_images.py`).
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from switokd.config.data_section import Data
from switokd.data import labels
from switokd.data.images import open_images
from switokd.errors import UsageError

MODULE = '''\
import torch


class Tenfold:
    """10 classes; test sample 7 has label 10."""

    classes = range(10)
    looked_at = []

    def __init__(self, train):
        self.train = train

    def __len__(self):
        return 20

    def __getitem__(self, index):
        type(self).looked_at.append(index)
        noise = torch.rand(1, 8, 8)
        return noise, 10 if index == 7 and not self.train else index % 10


class Targets(Tenfold):
    """The same labels, also listed as `targets`."""

    def __init__(self, train):
        super().__init__(train)
        self.targets = [10 if i == 7 and not train else i % 10 for i in range(20)]


class Mapped(Targets):
    """Its items map the targets to valid labels."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label % 10
'''


def write_fashion_mnist(root: Path, bad: int) -> None:
    """Write four images per part; the last training label is `bad`."""
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, values in (("train", [0, 1, 2, bad]), ("t10k", [0, 1, 2, 3])):
        images = np.zeros((4, 28, 28), np.uint8)
        header = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 28, 0, 0, 0, 28])
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = bytes([0, 0, 8, 1, 0, 0, 0, 4])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(values))


def test_invalid_label_of_images_in_memory(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, bad=12)
    data = Data(dataset="fashion-mnist", root=str(tmp_path), batch_size=2)
    sentence = (
        "data.dataset fashion-mnist, training sample 3: label 12 is outside the 10 classes (0 to 9)"
    )
    with pytest.raises(UsageError) as caught:
        open_images(data, seed=0)
    assert str(caught.value) == sentence


def test_valid_labels_of_images_in_memory(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, bad=9)
    data = Data(dataset="fashion-mnist", root=str(tmp_path), batch_size=2)
    assert open_images(data, seed=0).samples == 4


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module that only this test uses."""
    name = f"own_labels_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize("name", ["Tenfold", "Targets"])
def test_invalid_label_of_a_data_set_read_item_by_item(name: str, own_module: str) -> None:
    dataset = f"{own_module}:{name}"
    with pytest.raises(UsageError) as caught:
        open_images(Data(dataset=dataset, batch_size=4), seed=0)
    assert str(caught.value) == (
        f"data.dataset {dataset}, test sample 7: label 10 is outside the 10 classes (0 to 9)"
    )
    assert caught.value.seen_by_every_rank
    looked_at = vars(__import__(own_module))[name].looked_at
    assert looked_at[:2] == [0, 0]  # tell the form of the items, in training and test
    assert len(looked_at) == 2 + (28 if name == "Tenfold" else 1)  # `targets` show the invalid one


def test_the_label_of_an_item_wins_over_targets(own_module: str) -> None:
    images = open_images(Data(dataset=f"{own_module}:Mapped", batch_size=4), seed=0)
    assert images.classes == 10


def test_check_ends_at_its_deadline_and_keeps_the_generators(
    own_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "LOOK_SECONDS", -1.0)
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    images = open_images(Data(dataset=f"{own_module}:Tenfold", batch_size=4), seed=0)
    after = torch.get_rng_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    with pytest.raises(UsageError, match="sample 7: label 10 is outside the 10 classes"):
        list(images.test())  # loading finds it later
