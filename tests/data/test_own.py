"""Faults of a user's own data set are one line that names the sample, the line and the error.

Not covered: the forms of items (`test_items.py`); loader processes that are killed
(`test_loader.py`).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from switokd import plugins
from switokd.config.data_section import Data
from switokd.data import labels
from switokd.data.images import Images, open_images
from switokd.data.loader import Failed
from switokd.errors import OwnCodeError, SwitokdError, UsageError
from switokd.runtime.lifecycle import Terminated

# The DataLoader warns on machines with fewer processors than loader processes.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

MODULE = '''\
import torch


class Strange(Exception):
    """Cannot be pickled, and its message is an error."""

    def __init__(self, a, b):
        self.lock = lambda: None

    def __str__(self):
        raise RuntimeError


class NoException(BaseException):
    pass


def error(kind):
    if kind == "strange":
        return Strange(1, 2)
    if kind == "base":
        return NoException("two\\nlines")
    if kind == "exit":
        return SystemExit(3)
    kinds = {"value": ValueError, "stop": StopIteration, "memory": MemoryError, "index": IndexError}
    return kinds[kind]("cannot decode")


class Bad:
    classes = 4
    targets = [i % 4 for i in range(24)]  # so that no item is read before training

    def __init__(self, train, kind="", sample=13, part=True, length=24):
        self.kind, self.sample, self.length = kind, sample, length
        self.fails = train == part

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.fails and index == self.sample:
            raise error(self.kind)  # here
        return torch.zeros(1, 4, 4), index % 4


def make(train, fault):
    if fault == "raises":
        raise LookupError("no such folder")
    if fault == "stops":
        next(iter(()))
    if fault == "type":
        return len(3)
    if fault == "generator":
        return ((torch.zeros(1, 4, 4), 0) for _ in range(9))
    return Dict() if fault == "lambda" else None


class Dict:
    classes = ["a", "b"]

    def __init__(self):
        self.transform = lambda x: x

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"image": torch.zeros(1, 4, 4), "label": 0, "id": index}
'''

LINE = next(i for i, line in enumerate(MODULE.splitlines(), 1) if "# here" in line)
Open = Callable[..., Images]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Return a function that opens a data set of a user's module."""
    name = f"own_{re.sub(r'[^a-z0-9]', '_', tmp_path.name)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def open_own(what: str, workers: int = 0, **kwargs: Any) -> Images:
        data = Data(dataset=f"{name}:{what}", kwargs=kwargs, batch_size=8, workers=workers)
        return open_images(data, seed=0)

    return open_own


def message_of(error: SwitokdError) -> str:
    assert "\n" not in str(error)
    assert error.exit_code == 2
    return str(error)


KINDS = {
    "value": "ValueError: cannot decode",
    "stop": "StopIteration: cannot decode; the data set says that it has 24 samples",
    "index": "IndexError: cannot decode; the data set says that it has 24 samples",
    "memory": "MemoryError: cannot decode",
    "exit": "SystemExit: it ends the process, with 3",
    "base": "NoException: two",
    "strange": "Strange",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_that_raises_is_one_line(own: Open, kind: str) -> None:
    with pytest.raises(OwnCodeError) as caught:
        list(own("Bad", kind=kind).stream(3))
    error, _, more = KINDS[kind].partition("; ")
    where = rf"^own_\w+\.py:{LINE} in __getitem__ \(data.dataset own_\w+:Bad, training sample 13\)"
    sentence = rf"{where}: {error} \(`raise .*`\){'; ' * bool(more)}{more}$"
    assert re.search(sentence, message_of(caught.value))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_an_item_comes_back_from_another_process(own: Open, kind: str) -> None:
    view = own("Bad", kind=kind, part=False).view(train=False)
    failed = view.__getitems__([(0, 13)])
    assert isinstance(failed, Failed)
    back = pickle.loads(pickle.dumps(failed)).as_here()
    assert isinstance(back, OwnCodeError)
    assert str(back) == str(failed.error)
    assert "raise error(self.kind)  # here" in str(back.__cause__)  # its frames, for --verbose


@pytest.mark.timeout(60)
def test_an_item_that_raises_in_a_loader_process_is_the_same_line(own: Open) -> None:
    lines = []
    for workers in (0, 1):
        with pytest.raises(OwnCodeError) as caught:
            list(own("Bad", workers, kind="strange", part=False).test(8))
        lines.append(message_of(caught.value))
    assert lines[0] == lines[1]
    assert ", test sample 13): " in lines[0]


def test_a_signal_in_the_users_code_is_no_fault_of_it() -> None:
    def handler() -> None:
        raise Terminated

    handler.__code__ = handler.__code__.replace(co_filename=labels.__file__)

    class Slow(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            handler()

    with pytest.raises(Terminated):
        open_objects(Slow([0]))


def test_a_length_that_is_too_long(own: Open) -> None:
    images = own("Bad", kind="index", sample=20)
    with pytest.raises(
        OwnCodeError, match=r"sample 20.*; the data set says that it has 24 samples"
    ):
        list(images.stream(3))


def open_objects(train: Any, test: Any = None, classes: int | None = None) -> Images:
    lent = plugins.Datasets(train, train if test is None else test, classes)
    with plugins.lend({"<object data: it>": lent}):
        return open_images(Data(dataset="<object data: it>", batch_size=2), seed=0)


PAIRS = [(torch.zeros(1, 4, 4), i % 2) for i in range(6)]


class Length(list[Any]):
    def __init__(self, length: Any) -> None:
        super().__init__(PAIRS)
        self.length = length

    def __len__(self) -> Any:
        if isinstance(self.length, Exception):
            raise self.length
        return self.length


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(PAIRS)

    def __len__(self) -> int:
        return 6


class Empty(Dataset[Any]):
    def __len__(self) -> int:
        return 6


class Classes(list[Any]):
    classes: Any

    def __init__(self, classes: Any) -> None:
        super().__init__(PAIRS)
        self.classes = classes


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (Length(-1), "training set, its length: ValueError: __len__() should return >= 0"),
        (Length(6.0), "its length: TypeError: 'float' object cannot be interpreted as an integer"),
        (Length(None), "its length: TypeError: 'NoneType' object cannot be interpreted"),
        (
            Length(ArithmeticError("no")),
            "__len__ (data.dataset <object data: it>, training set, its length): Arith",
        ),
        (Length(10**30), "its length: OverflowError"),
        (Length(0), "training set is a data set without samples"),
        (
            Length(9),
            "sample 6: IndexError: list index out of range; the data set says that it has 9",
        ),
        (Stream(), "training set is a Stream, which can only be iterated"),
        (iter(PAIRS), "training set is a list_iterator, which can only be iterated"),
        ({0, 1}, "training set is a set, which can only be iterated"),
        (DataLoader(PAIRS), "is a DataLoader, which makes batches itself; give its data set"),  # type: ignore[arg-type]
        (Empty(), "training sample 0: NotImplementedError"),
        (42, "training set: it must be a data set with a length and items, got int"),
        (
            np.zeros((6, 1, 4, 4)),
            "training sample 0: an item must be (image, label), got a ndarray",
        ),
        (
            TensorDataset(torch.zeros(6, 1, 4, 4)),
            "sample 0: an item must be (image, label), got a tu",
        ),
        (Classes("ab"), "its `classes` must be a number or a list of names, got str 'ab'"),
        (Classes({"a", "b"}), "its `classes` must be a number or a list of names, got set"),
        (Classes([]), "its `classes` must be a number or a list of names, got a list of 0"),
        (Classes(2.5), "its `classes` must be a number or a list of names, got float"),
        (Classes(0), "its `classes` is 0; there must be at least 1"),
    ],
)
def test_message_for_what_is_no_usable_data_set(train: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_objects(train)
    message = message_of(caught.value)
    assert sentence in message
    assert "data.dataset <object data: it>" in message


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(1, 4, 4).byte(), "floats of 1 channel, and test images bytes of 1 channel;"),
        (torch.zeros(3, 4, 4), "floats of 1 channel, and test images floats of 3 channels; end"),
    ],
)
def test_training_and_test_images_of_different_kinds(image: torch.Tensor, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_objects(PAIRS, [(image, 0)])
    assert f"<object data: it>: training images are {words}" in str(caught.value)


def test_labels_that_are_all_below_0() -> None:
    with pytest.raises(UsageError, match="training sample 0: label -1 is below 0"):
        open_objects([(torch.zeros(1, 4, 4), -1)] * 4)


def test_the_length_of_the_test_set_is_checked_as_well() -> None:
    with pytest.raises(UsageError, match="test set is a Stream, which can only be iterated"):
        open_objects(PAIRS, Stream())


def test_a_length_that_changes_is_read_once() -> None:
    changing = Length(4)
    images = open_objects(changing, PAIRS)
    changing.length = 2
    assert images.samples == 4


@pytest.mark.parametrize(
    ("classes", "count", "names"),
    [
        (np.int64(3), 3, ()),
        (("a", "b"), 2, ("a", "b")),
        ({"b": 1, "a": 0}, 2, ("a", "b")),
        (range(2), 2, ("0", "1")),
    ],
)
def test_classes_that_a_data_set_tells(classes: Any, count: int, names: tuple[str, ...]) -> None:
    sources = open_objects(Classes(classes)).sources
    assert (sources.classes, sources.names) == (count, names)


def test_one_hot_labels_tell_the_number_of_classes() -> None:
    images = open_objects([(x, np.eye(5)[y]) for x, y in PAIRS])
    assert images.classes == 5
    (_, y), *_ = images.test()
    assert y.tolist() == [0, 1, 0, 1, 0, 1]


def test_parts_of_items_that_are_not_used_are_said_once(own: Open) -> None:
    images = own("make", fault="lambda")
    (note,) = images.sources.notes
    assert note.endswith(": image image, label label; not used: id")
    assert open_objects(PAIRS).sources.notes == ()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            "raises",
            r"^own_\w+.py:\d+ in make \(.*make with train=True\): LookupError: no such",
        ),
        ("stops", r"^own_\w+.py:\d+ in make \(.*make with train=True\): StopIteration "),
        ("type", r"in make \(.*\): TypeError: object of type 'int' has no len\(\) "),
        ("generator", r"make, training set is a generator, which can only be iterated"),
    ],
)
def test_a_callable_that_fails_is_one_line(own: Open, fault: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        own("make", fault=fault)
    assert re.search(sentence, message_of(caught.value))


def test_a_data_set_that_cannot_be_sent_to_a_loader_process(own: Open) -> None:
    images = own("make", 1, fault="lambda")
    with pytest.raises(
        UsageError, match=r"^data.workers: the data set cannot be sent to a loader pr"
    ):
        list(images.stream(1))
