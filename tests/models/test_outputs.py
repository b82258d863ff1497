"""Outputs that are no tensor: where their logits are, and the line if they are not found.

Not covered: runs with such networks (`tests/training/test_outputs.py`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from switokd.errors import UsageError
from switokd.models.outputs import Key, give_logits
from switokd.models.registry import build

Named = namedtuple("Named", "logits aux_logits")  # as torchvision's


class Network(nn.Module):
    """Returns what `form` makes of the logits `[n, 4]`."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head, self.form = nn.Linear(6, 4), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(x))


def answer(form: Callable[[Tensor], Any], key: Key | None = None) -> Tensor:
    """Return what a network with this form of output answers to two images."""
    network = Network(form)
    give_logits(network, "own:net", 4, key)
    x = torch.rand(2, 6)
    z: Tensor = network(x)
    assert torch.equal(z, network.head(x))
    assert torch.equal(copy.deepcopy(network)(x), z)  # as a moving average does
    assert list(network.state_dict()) == ["head.weight", "head.bias"]
    return z


@pytest.mark.parametrize(
    "form",
    [
        lambda z: z,
        lambda z: (z,),
        lambda z: [z, z.new_zeros(2, 64)],
        lambda z: (z.new_zeros(2, 64), z),
        lambda z: (z, None, {"features": z}),
        lambda z: {"logits": z, "other": z},
        lambda z: {"out": z, "features": z.new_zeros(2, 4, 7)},
        lambda z: OrderedDict(loss=z.mean(), logits=z, hidden=(z, z)),
        lambda z: SimpleNamespace(logits=z),
        lambda z: SimpleNamespace(scores=z, features=z.new_zeros(2, 64)),
        lambda z: Named(z, z + 1),
    ],
)
def test_plain_outputs_are_guessed(form: Callable[[Tensor], Any]) -> None:
    answer(form)


@pytest.mark.parametrize(
    ("key", "form"),
    [
        (0, lambda z: (z, z + 1)),
        (-1, lambda z: [z + 1, z]),
        ("main", lambda z: {"main": z, "logits": z + 1}),
        (1, lambda z: {"features": z + 1, "main": z}),
        (1, lambda z: {0: z + 1, 1: z}),
        ("main", lambda z: SimpleNamespace(main=z, logits=z + 1)),
        ("logits", lambda z: Named(z, z + 1)),
        (0, lambda z: z),  # torchvision's GoogLeNet and Inception return a tensor in evaluation
    ],
)
def test_the_setting_names_the_logits(key: Key, form: Callable[[Tensor], Any]) -> None:
    answer(form, key)


@pytest.mark.parametrize(
    ("key", "form", "words"),
    [
        (None, lambda z: (z, z), "returns a tuple (0: [2, 4], 1: [2, 4]) in training; it must"),
        (None, lambda z: {"a": z, "b": z}, "a dict (a: [2, 4], b: [2, 4]) in training; it must"),
        (None, lambda z: (z[:, :3],), "name the part that holds them by networks.NAME.output: a k"),
        (None, lambda z: None, "own:net returns None in training; it must return logits [n, 4]"),
        (None, lambda z: "cat", "own:net returns a str in training; it must return logits [n, 4]"),
        (None, lambda z: SimpleNamespace(a=z, b=z), "a SimpleNamespace (a: [2, 4], b: [2, 4]) in"),
        ("logit", lambda z: {"logits": z}, "networks.NAME.output: logit is not there"),
        (2, lambda z: (z, z), "networks.NAME.output: 2 is not there"),
        (0, lambda z: SimpleNamespace(logits=z), "networks.NAME.output: 0 is not there"),
        ("a", lambda z: {"a": (z, z)}, "output: a is a tuple (0: [2, 4], 1: [2, 4]), no tensor"),
        (1, lambda z: (z, z[0]), "logits of shape (2, 4) in training, got (4,)"),
        (None, lambda z: z[:, :3], "must turn 2 images into logits of shape (2, 4) in training, g"),
        (None, lambda z: z.long(), "of shape (2, 4) in training, got torch.int64"),
    ],
)
def test_an_output_without_logits_is_described_in_one_line(
    key: Key | None, form: Callable[[Tensor], Any], words: str
) -> None:
    with pytest.raises(UsageError) as found:
        answer(form, key)
    assert words in str(found.value)
    assert "\n" not in str(found.value)
    assert not found.value.seen_by_every_rank


def test_only_networks_of_others_have_a_hook() -> None:
    assert not build("wrn-10-1", 3, 10)._forward_hooks
    assert build("torch.nn:Identity", 3, 10)._forward_hooks


def test_a_network_of_torchvision_that_returns_more_in_training_only() -> None:
    network = build("googlenet", 3, 7, {"init_weights": False})
    for training in (True, False):
        assert network.train(training)(torch.rand(2, 3, 64, 64)).shape == (2, 7)
