"""The state dict of a network as files hold it: tensors, and plain values beside them.

A module may add values of its own to its state dict, by `get_extra_state` or a hook. A file can
hold them if reading them runs no code. They must also be accepted by the module that has given
them, or nobody could load the weights.

Not covered: which state dict of a file fits a network (`state_dicts.py`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from switokd.errors import UsageError, first_line, own_code_error, own_code_errors

EXTRA = "_extra_state"
"""Last component of the entries that `get_extra_state` has returned."""

PLAIN = (Tensor, bool, int, float, str, bytes, type(None))
"""Types of the values that a file may hold, inside of lists, tuples and dicts."""

LISTS, DICTS = (list, tuple, torch.Size), (dict, OrderedDict)


def unplain(value: Any) -> str:
    """Return the name of a type in `value` whose loading would need code; "" if there is none."""
    if type(value) in DICTS:
        return next((name for pair in value.items() if (name := unplain(pair))), "")
    if type(value) in LISTS:
        return next((name for item in value if (name := unplain(item))), "")
    return "" if type(value) in PLAIN else type(value).__name__


def state_to_save(network: nn.Module, what: str) -> dict[str, Any]:
    """Return a network's state dict, with tensors that are contiguous on the CPU.

    what: names the network in errors. UsageError if a file cannot hold a value; OwnCodeError for an
    error of the user's own methods.
    """
    with own_code_errors(what):
        state = network.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor) and (name := unplain(value)):
            raise UsageError(
                f"{what}: {key} of its state dict holds a {name}, which no file of weights may "
                "hold; allowed are tensors, numbers, texts, lists and dicts",
                every_rank=False,
            )
    return {
        key: value.cpu().contiguous() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }


def check_own_state(network: nn.Module, what: str) -> None:
    """UsageError unless a network's own additions to its state dict can be saved and loaded.

    Otherwise the mistake would show after the training. `set_extra_state` is called once with what
    `get_extra_state` has returned. what: names the network in errors.
    """
    with own_code_errors(what):
        state = network.state_dict()
    if all(isinstance(state[key], Tensor) and not is_extra(key) for key in state):
        return
    try:
        network.load_state_dict(state_to_save(network, what))
    except UsageError:
        raise
    except Exception as error:
        if found := own_code_error(error, what):
            raise found from error
        raise UsageError(
            f"{what}: it does not load its own state dict: {_reason(error)}; write "
            "set_extra_state beside get_extra_state, or leave the additions out of state_dict",
            every_rank=False,
        ) from error


def is_extra(key: str) -> bool:
    """Whether a key of a state dict is that of an extra state."""
    return key.rpartition(".")[2] == EXTRA


def modules_with_extra_state(network: nn.Module) -> list[str]:
    """Return the names of the modules that have an extra state."""
    return [
        name
        for name, module in network.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and type(module).get_extra_state is not nn.Module.get_extra_state
    ]


def copy_extra_states(network: nn.Module, into: nn.Module, names: Iterable[str]) -> None:
    """Copy the extra states of the modules of these names into another network of the same kind."""
    for name in names:
        state = copy.deepcopy(network.get_submodule(name).get_extra_state())
        into.get_submodule(name).set_extra_state(state)


def _reason(error: Exception) -> str:
    """Return the first line of an error that says something; PyTorch's begins with a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else first_line(error)
