"""Finds the logits in what a network returns: a tensor, or a tuple, a mapping or an object of them.

`give_logits` adds a forward hook to the network. Whoever calls the network then gets plain logits:
training, evaluation, planning and export. Its own modules, weights and their names stay the same.

Not covered: TorchScript modules, to which PyTorch adds no hooks: they must return a tensor. Logits
inside of something inside of the output. Outputs that are to be combined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switokd.errors import UsageError

LOGITS = "logits"
"""Key or attribute of the logits in the outputs of Hugging Face and torchvision."""

MOST_PARTS = 8
"""Parts of an output that an error describes, at most."""

Key = str | int
"""Name of an entry or attribute, or index of an element; a negative index counts from the end."""


def give_logits(network: nn.Module, name: str, classes: int, key: Key | None = None) -> None:
    """Make a network return its logits `[n, classes]` alone, whatever else its forward returns.

    A tensor is returned as it is. name: the model's name, for errors. key: where the logits are in
    any other output; None: guess it. Calling the network then raises UsageError if they cannot be
    found, or are no logits of so many classes.
    """
    if not isinstance(network, torch.jit.ScriptModule):
        network.register_forward_hook(_LogitsHook(name, classes, key))


def leave_uncompiled(network: nn.Module) -> None:
    """Let torch.compile leave out the hook of `give_logits`: it would be a graph of its own."""
    hooks = network._forward_hooks
    for key, hook in hooks.items():
        if isinstance(hook, _LogitsHook):
            hooks[key] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _LogitsHook:
    """A forward hook; copies of the network have a copy of it."""

    name: str
    classes: int
    key: Key | None

    def __call__(self, network: nn.Module, args: Any, output: Any) -> Tensor | None:
        z = output if isinstance(output, Tensor) else self._find(network, output)
        # The number of images is compared elsewhere: a traced program has none.
        if z.dim() != 2 or z.shape[1] != self.classes or not z.is_floating_point():
            n = len(args[0])
            when = " in training" if network.training else ""
            raise UsageError(
                f"model {self.name} must turn {n} images into logits of shape ({n}, "
                f"{self.classes}){when}, got {not_logits(z, n, self.classes)}",
                every_rank=False,
            )
        return None if z is output else z  # None: PyTorch keeps the output

    def _find(self, network: nn.Module, output: Any) -> Tensor:
        """Return the logits in an output that is no tensor; UsageError if they are not found."""
        logits = self._guess(output) if self.key is None else _part(output, self.key)
        if isinstance(logits, Tensor):
            return logits
        when = "in training" if network.training else "in evaluation"
        found = f"model {self.name} returns {describe(output)} {when}"
        if self.key is not None:
            problem = "is not there" if logits is None else f"is {describe(logits)}, no tensor"
            where = f"networks.NAME.output: {self.key} {problem}"
            raise UsageError(f"{found}; {where}", every_rank=False)
        remedy = f"it must return logits [n, {self.classes}]"
        if _parts(output):
            remedy += "; name the part that holds them by networks.NAME.output: a key, an attribute"
            remedy += " or an index"
        raise UsageError(f"{found}; {remedy}", every_rank=False)

    def _guess(self, output: Any) -> Any:
        """Return the part named `LOGITS`, or the only part that can be logits; else None."""
        named = _part(output, LOGITS)
        if isinstance(named, Tensor):
            return named
        parts = [part for _, part in _parts(output) if isinstance(part, Tensor)]
        possible = [part for part in parts if part.dim() == 2 and part.shape[1] == self.classes]
        return possible[0] if len(possible) == 1 else None


def _part(output: Any, key: Key) -> Any:
    """Return the part of an output with this key, attribute or index; None if there is none."""
    if isinstance(output, Mapping):
        if key in output or isinstance(key, str):
            return output.get(key)
        output = list(output.values())
    if isinstance(key, str):
        return getattr(output, key, None)
    if isinstance(output, Sequence) and not isinstance(output, str):
        return output[key] if -len(output) <= key < len(output) else None
    return None


def _parts(output: Any) -> list[tuple[Key, Any]]:
    """Return the parts of an output by key, name or index; an empty list if it has none."""
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(output._fields, output, strict=True))
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    return list(getattr(output, "__dict__", {}).items())


def not_logits(z: Any, n: int, classes: int) -> str:
    """Describe what is wrong with the logits of `n` images: their shape or type; "" if nothing."""
    if not isinstance(z, Tensor):
        return type(z).__name__
    if z.shape != (n, classes):
        return str(tuple(z.shape))
    return "" if z.is_floating_point() else str(z.dtype)


def describe(output: Any) -> str:
    """Describe an output by its type and parts: "a tuple (0: [16, 4], 1: [16, 64])"."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    if output is None:
        return "None"
    parts = _parts(output)
    listed = [
        f"{key}: {list(part.shape) if isinstance(part, Tensor) else type(part).__name__}"
        for key, part in parts[:MOST_PARTS]
    ]
    listed += ["..."] if len(parts) > MOST_PARTS else []
    kind = type(output).__name__
    article = "an" if kind[0] in "aeiouAEIOU" else "a"
    return f"{article} {kind} ({', '.join(listed)})" if listed else f"{article} {kind}"
