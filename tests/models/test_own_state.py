"""State dicts with entries that are no tensors: saved, loaded, averaged, or refused in one line.

Not covered: what files of others hold (`test_given_weights.py`).
"""

from __future__ import annotations

import io
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from switokd.errors import OwnCodeError, UsageError
from switokd.models.given_weights import load_weights
from switokd.models.own_state import check_own_state, state_to_save
from switokd.training.ema import MovingAverage

WHAT = "network s"


class WithExtra(nn.Module):
    """A network with an extra state, which it restores."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.net, self.value = nn.Linear(3, 2), value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


class OnlyGets(nn.Linear):
    def get_extra_state(self) -> int:
        return 3


class Raises(nn.Linear):
    def get_extra_state(self) -> int:
        raise ValueError("no idea")


def hooked() -> nn.Module:
    network = nn.Linear(3, 2)
    network.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
        lambda module, state, prefix, metadata: state.update(version=3)
    )
    return network


PLAIN = [
    None,
    3,
    float("inf"),
    "text",
    b"bytes",
    True,
    (1, 2.0),
    [1, [2]],
    {"a": {"b": None}},
    OrderedDict(a=1),
    torch.ones(2),
    {"calls": 3, "scale": torch.ones(2)},
    torch.Size([2]),
]


@pytest.mark.parametrize("value", PLAIN, ids=str)
def test_plain_extra_states_are_saved_and_loaded(value: Any, tmp_path: Path) -> None:
    network, path = WithExtra(value), tmp_path / "w.pt"
    check_own_state(network, WHAT)
    torch.save(state_to_save(network, WHAT), path)
    into = WithExtra()  # as it is before its first step
    said = load_weights(into, path, "run r, network s")
    assert said.startswith("3 of 3 entries from")
    assert type(into.value) is type(value)
    assert str(into.value) == str(value)
    assert torch.equal(into.net.weight, network.net.weight)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (io.BytesIO(b"x"), "BytesIO"),
        (np.ones(2), "ndarray"),
        (np.float32(1), "float32"),
        ({1, 2}, "set"),
        ([{"a": np.int64(1)}], "int64"),
        (defaultdict(list), "defaultdict"),
        (nn.Linear, "type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "of type",  # no address in the name
)
def test_what_no_file_may_hold_is_refused_before_training(value: Any, name: str) -> None:
    for refuses in (check_own_state, state_to_save):
        with pytest.raises(UsageError) as found:
            refuses(WithExtra(value), WHAT)
        assert str(found.value).startswith(
            f"network s: _extra_state of its state dict holds a {name}, which no file of weights"
        )


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (OnlyGets(3, 2), "it does not load its own state dict: Unexpected key(s) in state_dict: "),
        (hooked(), 'it does not load its own state dict: Unexpected key(s) in state_dict: "versi'),
    ],
)
def test_what_the_network_does_not_load_again_is_refused(network: nn.Module, words: str) -> None:
    with pytest.raises(UsageError) as found:
        check_own_state(network, WHAT)
    assert str(found.value).startswith(f"network s: {words}")
    assert "write set_extra_state beside get_extra_state" in str(found.value)
    assert "\n" not in str(found.value)


def test_an_error_of_the_users_method_names_its_place() -> None:
    with pytest.raises(
        OwnCodeError, match=r"test_own_state\.py:\d+ in get_extra_state \(network s\)"
    ):
        check_own_state(Raises(3, 2), WHAT)


def test_a_network_without_additions_is_not_loaded() -> None:
    class Fails(nn.Linear):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    check_own_state(Fails(3, 2), WHAT)


def test_what_is_saved_is_a_copy() -> None:
    network = WithExtra({"calls": [1]})
    state = state_to_save(network, WHAT)
    network.value["calls"].append(2)
    assert state["_extra_state"] == {"calls": [1]}


def test_a_moving_average_has_the_extra_state_of_its_network() -> None:
    part = WithExtra([1])
    network = nn.Sequential(part)
    average = MovingAverage(network, 0.9)
    part.value.append(2)
    average.update(network)
    part.value.append(3)
    (averaged,) = average.module.children()
    assert isinstance(averaged, WithExtra)
    assert averaged.value == [1, 2]
