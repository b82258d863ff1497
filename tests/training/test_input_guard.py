"""What one network or data set does in place changes nothing for another network on its rank.

Not covered: the same with real ranks (`tests/data/test_draws.py`), and on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.in_process import ONE_PROCESS, InProcess
from switokd.config.config import Config
from switokd.data.augment import mix
from switokd.data.sources import ItemSource
from switokd.distillation.strategies.base import Strategy
from switokd.errors import UsageError
from switokd.training.build import separate
from switokd.training.held_out import HeldOut
from switokd.training.input_guard import InputGuard, lazy_copy

STEPS = 4

CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda x: x.mul_(0.5),
    "view": lambda x: x[:, :, 2:].add_(1),
    "out": lambda x: torch.mul(x, 0.5, out=x),
    "data": lambda x: x.data.mul_(0.5),
    "numpy": lambda x: np.multiply(x.numpy(), 0.5, out=x.numpy()),
    "storage": lambda x: x.untyped_storage().fill_(1),  # type: ignore[attr-defined]
    "memory": lambda x: ctypes.memset(x.data_ptr(), 0, 8),
}
MEMORY: dict[str, Callable[[], Tensor]] = {
    "own": lambda: torch.rand(2, 1, 4, 4),
    "part": lambda: torch.rand(5, 1, 4, 4)[2:4],
    "channels last": lambda: torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "numpy": lambda: torch.from_numpy(np.ones((2, 1, 4, 4), "float32")),
    "shared": lambda: torch.rand(2, 1, 4, 4).share_memory_(),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_reaches_no_other_copy(memory: str, change: str) -> None:
    x = MEMORY[memory]()
    before, (one, other) = x.clone(), (lazy_copy(x), lazy_copy(x))
    assert one.stride() == x.stride()
    CHANGES[change](one)
    assert torch.equal(x, before)
    assert torch.equal(other, before)
    assert not torch.equal(one, before)


class Net(nn.Module):
    """Changes its input as `CHANGES` says, from step `first` on, or only while it is tested."""

    seen: ClassVar[list[int]] = []
    """Addresses of the images that the forward passes got."""

    def __init__(self, change: str = "", first: int = 1, tested: bool = False) -> None:
        super().__init__()
        self.change, self.first, self.tested, self.step = change, first, tested, 0
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        Net.seen.append(torch._C._data_address(x))  # type: ignore[attr-defined]
        self.step += self.training
        early = self.layers(x.clone() if self.change else x)
        if self.change and self.training != self.tested and self.step >= self.first:
            CHANGES[self.change](x)
        z: Tensor = self.head(early + self.layers(x))
        return z


def trained(teacher: dict[str, Any], student: dict[str, Any], **sections: Any) -> InProcess:
    """Networks after a few steps; each of them is last once in the order of the networks."""
    model = {"model": "tests.training.test_input_guard:Net"}
    raw = {
        **ONE_PROCESS,
        "name": "guarded",
        "device": "cpu",
        "data": {"dataset": "digits", "batch_size": 8, "train_samples": 8 * STEPS},
        "networks": {
            "t": {**model, "role": "teacher", "model_kwargs": teacher},
            "s": {**model, "role": "student", "model_kwargs": student},
        },
        "distillation": {"strategy": "vanilla"},
        "schedule": {"epochs": 1},
        **sections,
    }
    ours = InProcess(Config.model_validate(raw))
    Net.seen.clear()
    for x, y in ours.batches(STEPS):
        ours.step(x, y)
    return ours


def weights(ours: InProcess, name: str) -> list[Tensor]:
    (model,) = (li.model for li in ours.learners if li.name == name)
    return [*model.state_dict().values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("sections", [{}, {"compute": {"micro_batches": 2}}], ids=str)
@pytest.mark.parametrize(
    "kwargs", [{"change": change} for change in CHANGES] + [{"change": "view", "first": 3}], ids=str
)
def test_networks_train_as_if_nobody_changed_anything(
    kwargs: dict[str, Any], sections: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    clean = trained({}, {}, **sections)
    assert capsys.readouterr().err == ""
    first, second = trained(kwargs, {}, **sections), trained({}, kwargs, **sections)
    assert equal(weights(first, "s"), weights(clean, "s"))
    assert equal(weights(second, "t"), weights(clean, "t"))
    for name, changed in (("t", first), ("s", second)):
        assert not equal(weights(changed, name), weights(clean, name))
        # Alone, with no other network that could restore or need its images.
        own = trained(*([kwargs] * 2), **sections)
        assert equal(weights(own, name), weights(changed, name))
    lines = [line for line in capsys.readouterr().err.splitlines() if "in place" in line]
    leaves_no_trace = kwargs["change"] in ("data", "numpy", "storage", "memory")
    assert len(lines) == (0 if leaves_no_trace else 6)
    assert all(line.startswith("switokd: network ") for line in lines)


@pytest.mark.parametrize("sections", [{}, {"compute": {"micro_batches": 2}}], ids=str)
def test_nothing_is_copied_where_nobody_changes_its_input(sections: dict[str, Any]) -> None:
    trained({}, {}, **sections)
    count = len(Net.seen) // STEPS // 2
    steps = [Net.seen[i : i + 2 * count] for i in range(0, len(Net.seen), 2 * count)]
    assert len(steps) == STEPS
    assert all(step[:count] == step[count:] for step in steps)


class Observer(Strategy):
    """Keeps the student's logits of the held-out images."""

    logits: Tensor

    def observe(self, logits: Mapping[str, Tensor], y: Tensor) -> None:
        self.logits = logits["s"]


@pytest.mark.parametrize("change", ["in place", "data"])
def test_a_change_in_evaluation_only(change: str) -> None:
    observers = []
    for kwargs in ({}, {"change": change, "tested": True}):
        ours, observer = trained(kwargs, {}), Observer()
        images = replace(ours.images, held_out=12)
        HeldOut.of(images, observer, ours._context.exchange).observe(ours.learners, STEPS + 1)
        observers.append(observer)
    assert torch.equal(observers[0].logits, observers[1].logits)


def test_one_warning_names_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    guard, silent = InputGuard("t1"), InputGuard("t1", warns=False)
    x = torch.ones(2)
    for call in (guard, guard, silent):
        assert call(lambda x: x.mul_(2), x).tolist() == [2.0, 2.0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "switokd: network t1 changes its input in place; it gets a copy in every step, and other "
        "networks keep their images. x = x * 2 instead of x.mul_(2) needs no copy"
    )


def test_a_data_set_may_use_its_memory_again() -> None:
    class Reused:
        image = torch.empty(1, 2, 2)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.image.fill_(index), index

    x, _ = ItemSource(Reused(), 3, "data").fetch([0, 1, 2], mix(np.arange(3)))
    assert x[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_networks_of_a_process_share_no_memory() -> None:
    one, table = nn.Linear(2, 2), torch.ones(2)
    one.register_buffer("table", table)
    with pytest.raises(UsageError) as caught:
        separate(nn.Sequential(nn.Linear(1, 1), one), "model nets:net", {"t": one})
    assert str(caught.value) == (
        "model nets:net has the parameter 1.weight of network t; each call must make a new module, "
        "with parameters of its own"
    )
    other = nn.Linear(2, 2)
    other.register_buffer("table", table)
    other.register_buffer("again", table)
    separate(other, "model nets:net", {"t": one})
    other.table.zero_()  # type: ignore[operator]
    assert (table.tolist(), other.again.tolist()) == ([1.0, 1.0], [0.0, 0.0])  # type: ignore[operator]
