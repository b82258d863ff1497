"""The forms of items, images and labels that data sets of the ecosystem have.

Not covered: items that raise errors (`test_own.py`).
"""

from __future__ import annotations

import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from switokd.api import CONFIGURATION
from switokd.config.data_section import Data
from switokd.config.run_file import checked
from switokd.data.items import choose, class_of, image_tensor, left_out, parts_of
from switokd.errors import UsageError


@dataclass
class Sample:
    label: int
    image: str
    path: str = "a.png"


@dataclass(slots=True)
class Slotted:
    pixel_values: str
    labels: int


class Property:
    def __init__(self) -> None:
        self.number = 1

    @property
    def photo(self) -> str:
        return "I"


Reversed = namedtuple("Reversed", ["target", "img"])
Unknown = namedtuple("Unknown", ["first", "second", "third"])


@pytest.mark.parametrize(
    ("item", "keys", "unused"),
    [
        (("I", 1), None, ""),
        (["I", 1], None, ""),
        (("I", 1, "path", 7), None, "part 2, part 3"),
        (("path", "I", 1), (1, 2), "part 0"),
        (("I", "path", 1), (0, -1), "part 1"),
        ({"image": "I", "label": 1}, None, ""),
        (UserDict({"pixel_values": "I", "labels": 1, "mask": 0}), None, "mask"),
        ({"Img": "I", "fine_label": 1, "coarse_label": 9}, None, "coarse_label"),
        ({"photo": "I", "kind": 1, "label": 5}, ("photo", "kind"), "label"),
        ({"jpg": "I", "cls": 1, "json": {}, "__key__": "a"}, None, "json, __key__"),
        ({0: "I", 1: 1}, (0, 1), ""),
        (Sample(1, "I"), None, "path"),
        (Slotted("I", 1), None, ""),
        (SimpleNamespace(x="I", y=1), None, ""),
        (Property(), ("photo", "number"), ""),
        (Reversed(1, "I"), None, ""),
        (Unknown("I", 1, 0), None, "third"),
        (Unknown(0, 1, "I"), ("third", "second"), "first"),
    ],
)
def test_image_and_label_of_an_item(item: Any, keys: Any, unused: str) -> None:
    assert parts_of(item, keys) == ("I", 1)
    assert left_out(item, keys) == unused


@pytest.mark.parametrize(
    ("item", "keys", "sentence"),
    [
        (
            {"photo": "I", "label": 1},
            None,
            "an item has photo, label; the image is unknown, the label is label: name both with "
            "data.keys=[IMAGE, LABEL]",
        ),
        ({"image": 0, "x": 0, "y": 1}, None, "the image is image or x, the label is y"),
        ({"image": 0, "label": 1, "target": 2}, None, "the label is label or target"),
        (
            {"image": 0, "label": 1},
            ("image", "kind"),
            "data.keys: an item has no 'kind'; it has im",
        ),
        (("I", 1), ("image", "label"), "no 'image'; it has 2 parts, counted from 0"),
        (("I", 1), (0, 2), "data.keys: an item has no 2; it has 2 parts"),
        (("I",), None, "an item must be (image, label), got a tuple of 1"),
        (np.zeros((3, 8, 8)), None, "an item must be (image, label), got a ndarray of float64 [3,"),
        (torch.zeros(2, 8), None, "got a Tensor of torch.float32 [2, 8]"),
        (Image.new("L", (8, 8)), None, "an item must be (image, label), got Image"),
        (None, None, "an item must be (image, label), got NoneType"),
        ("ab", None, "an item must be (image, label), got str 'ab'"),
        (7, None, "an item must be (image, label), got int '7'"),
    ],
)
def test_message_if_nothing_tells_the_parts(item: Any, keys: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(item, keys)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "label",
    [
        *(3, 3.0, np.int8(3), np.uint64(3), np.float32(3), np.array(3), np.array([3.0]), [3]),
        *(torch.tensor(3), torch.tensor([3]), torch.tensor(3.0), torch.tensor(3, dtype=torch.half)),
        torch.tensor(3.0, requires_grad=True),
    ],
)
def test_exact_number(label: Any) -> None:
    assert class_of(label, 5) == (3, 4)
    assert type(class_of(label)[0]) is int


@pytest.mark.parametrize(
    "label",
    [
        *([0, 0, 0, 1, 0], np.eye(5)[3], torch.eye(5)[3], np.eye(5, dtype=bool)[3], np.eye(5)[3:4]),
        torch.eye(5, dtype=torch.bfloat16)[3],
    ],
)
def test_one_hot_label(label: Any) -> None:
    assert class_of(label, 5) == class_of(label) == (3, 5)


def test_true_and_false_are_classes() -> None:
    assert [class_of(v) for v in (True, np.False_, torch.tensor(True))] == [(1, 2), (0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (3.5, "the label 3.5 is not a whole number"),
        (float("nan"), "the label nan is not a whole number"),
        (np.float32("inf"), "the label inf is not a whole number"),
        (
            [0.25, 0.75],
            "a soft label is not supported: give the number of one class (data.label_sm",
        ),
        (
            torch.tensor([1, 0, 1, 0, 0]),
            "the label must be one class per image, got [1, 0, 1, 0, 0]",
        ),
        (np.zeros(5), "the label must be one class per image"),
        (np.array([0, 0, 7, 0, 0]), "the label must be a whole number or one-hot"),
        (np.eye(4)[0], "a one-hot label of 4 numbers, and the data set has 5 classes"),
        (np.eye(3), "the label must be a whole number or one-hot, got a ndarray of float64 [3, 3]"),
        ("cat", "must be a whole number, which is the number of its class, got str 'cat'"),
        (None, "the label must be a whole number, got NoneType"),
        ({"boxes": 1}, "the label must be a whole number, got dict"),
        (3j, "the label must be a whole number, got complex '3j'"),
        ([], "the label must be a whole number, got a list of 0"),
        (Fraction(1, 2), "the label must be a whole number, got Fraction '1/2'"),
        ([[1], [2, 3]], "the label must be a whole number, got a list of 2"),
        (torch.zeros(3, 8, 8), "float32 [3, 8, 8]; if it is another part of an item, name both wi"),
        (2**70, "the label 1180591620717411303424 is too large; number the classes from 0 without"),
        (1e300, "the label 100000000000000005250476025520 is too large"),
        (np.uint64(2**63), "the label 9223372036854775808 is too large"),
    ],
)
def test_message_for_a_label_that_is_no_class(label: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        class_of(label, 5)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


HWC = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
CHW = np.ascontiguousarray(HWC.transpose(2, 0, 1))
MANY = np.arange(8 * 8 * 13, dtype=np.uint8).reshape(8, 8, 13)


with warnings.catch_warnings():  # PyTorch gives them up
    warnings.simplefilter("ignore")
    QUANTIZED = torch.quantize_per_tensor(torch.ones(3, 8, 8), 0.1, 0, torch.quint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (HWC, CHW),
        (HWC[:, ::-1], CHW[:, :, ::-1]),
        (np.tile(CHW, (1, 2, 2)), np.tile(CHW, (1, 2, 2))),
        (MANY, MANY.transpose(2, 0, 1)),
        (MANY.transpose(2, 0, 1), MANY.transpose(2, 0, 1)),
        (np.zeros((3, 7, 3), np.uint8), np.zeros((3, 3, 7), np.uint8)),
        (np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)),
        (np.zeros((4, 4, 2), np.uint8), np.zeros((2, 4, 4), np.uint8)),
        (HWC[..., 0], CHW[:1]),
        (HWC[..., 0].tolist(), CHW[:1]),
        (HWC.astype(np.int64), CHW),
        (HWC.astype(np.float64) / 9, CHW.astype(np.float64) / 9),
        (HWC.astype(">f4"), CHW.astype(np.float32)),
        (HWC.astype(np.float16), CHW.astype(np.float16)),
        (Image.fromarray(HWC), CHW),
        (Image.fromarray(HWC[..., 0].copy()), CHW[:1]),
        (torch.from_numpy(CHW), CHW),
        (torch.from_numpy(CHW[0]), CHW[:1]),
        (torch.from_numpy(CHW).int(), CHW),
        (torch.from_numpy(CHW).float().requires_grad_(), CHW.astype(np.float32)),
        (torch.from_numpy(CHW).to_sparse(), CHW),
    ],
)
def test_image(image: Any, expected: Any) -> None:
    tensor = image_tensor(image)
    assert not tensor.requires_grad
    assert torch.equal(tensor, torch.from_numpy(np.array(expected)))
    assert tensor.dtype == torch.from_numpy(np.array(expected)).dtype


def test_a_read_only_array_is_an_image() -> None:
    array = HWC.copy()
    array.flags.writeable = False  # PyTorch would warn
    assert torch.equal(image_tensor(array), torch.from_numpy(CHW))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (
            np.zeros((16, 20, 8)),
            "an array [16, 20, 8] does not tell which dimension is its channels",
        ),
        (np.zeros((8, 8, 8)), "an array [8, 8, 8] does not tell"),
        (np.zeros(8), "an image must be [channels, height, width], got [8]"),
        (torch.zeros(1, 3, 8, 8), "got [1, 3, 8, 8]"),
        (torch.zeros(3, 0, 8), "got [3, 0, 8]"),
        (HWC.astype(np.uint16), "an image must hold bytes or floats, got uint16"),
        (HWC > 0, "an image must hold bytes or floats, got bool"),
        (HWC.astype(np.int32) * 9, "must hold 0 to 255, got 0 to 531 (int32)"),
        (torch.zeros(3, 8, 8, device="meta"), "a plain tensor, got one that is without values"),
        (QUANTIZED, "an image must be a plain tensor, got one that is quantized or nested"),
        (torch.tensor([[[-1]]]), "must hold 0 to 255, got -1 to -1 (int64)"),
        (HWC * 1j, "must be a tensor, an array or a PIL image, got a ndarray of complex128"),
        ("a.png", "must be a tensor, an array or a PIL image, got str 'a.png'"),
        (b"GIF", "must be a tensor, an array or a PIL image, got bytes"),
        (None, "must be a tensor, an array or a PIL image, got NoneType"),
        ({"bytes": b""}, "must be a tensor, an array or a PIL image, got dict"),
        ([[1], [2, 3]], "must be a tensor, an array or a PIL image, got a list of 2"),
    ],
)
def test_message_for_what_is_no_image(image: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        image_tensor(image)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "keys", ["image", ["image"], ["a", "a"], ["a", True], ["a", ""], [1.5, 0], 3]
)
def test_message_for_wrong_keys(keys: Any) -> None:
    raw = {"name": "n", "data": {"dataset": "m:f", "keys": keys}}
    raw["networks"] = {
        "t": {"role": "teacher", "model": "wrn-10-1"},
        "s": {"role": "student", "model": "wrn-10-1"},
    }
    with pytest.raises(
        UsageError, match=r"data.keys: found .*two different keys or positions, such"
    ):
        checked(raw, CONFIGURATION, [])


def test_keys_are_for_items() -> None:
    given = {"dataset": "m:f", "keys": ["image", 2]}
    assert Data.model_validate(given).keys == ("image", 2)
    with pytest.raises(ValueError, match="keys are for a dataset of your own"):
        Data(dataset="digits", keys=("image", "label"))
