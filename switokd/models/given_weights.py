"""Loads weights from a file into a network: all entries, or all but the classifier.

What is loaded must be the network's in name, shape and kind of number, and finite. Prefixes and
dicts around the state dict are found (`state_dicts.py`). Names of older releases are accepted where
the network's own modules accept them.

Not covered: classifiers that the file does not have at all; entries that are resized, such as
position embeddings for another image size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from switokd.errors import UsageError, first_line, nearest, own_code_errors
from switokd.models.own_state import is_extra
from switokd.models.state_dicts import COUNTERS, Match, kind, labels, matches
from switokd.models.weights_file import read_weights

SHOWN = 3
"""Names of entries in a message."""


def load_weights(
    network: nn.Module,
    path: Path,
    source: str,
    key: str | None = None,
    classes: int | None = None,
    fresh_classifier: bool = False,
) -> str:
    """Load a state dict from a file into a network, and return what was loaded, in one line.

    source: names the setting or run in errors. key: where the state dict is in the file; None:
    found. classes: of the network, which allows a classifier for another number of classes to be
    recognised; None: the file must fit as a whole. fresh_classifier: whether such a classifier
    keeps the network's values. UsageError if the file cannot be read, holds no state dict or
    several that fit, or one of another network, or values that are not finite.
    """
    expected = network.state_dict()
    match = _find(read_weights(path, source), expected, path, source, key)
    if not match.names_fit:
        match = _translated(network, match) or match
    fresh: list[str] = []
    if classes is not None and match.names_fit and match.misfits:
        found = _classes_of_classifier(match, expected, classes)
        if found is not None and not fresh_classifier:
            setting = source.removesuffix(".weights") + ".fresh_classifier"
            raise UsageError(
                f"{setting}: false, but {path} is for {found} classes and the data has {classes} "
                f"(entries {_some(match.misfits)}); with true these entries keep their initial "
                f"values, and the other {len(match.names) - len(match.misfits)} are loaded"
            )
        if found is not None:
            fresh = list(match.misfits)
    if not match.names_fit or len(fresh) < len(match.misfits):
        raise UsageError(
            f"{source}: {path} is of another network: {_describe_misfit(match, expected)}"
        )
    buffers = network.named_buffers(remove_duplicate=False)
    masks = {name for name, buffer in buffers if kind(buffer) == "float" and is_mask(buffer)}
    loaded = [name for name in match.names if name not in fresh]
    _copy(network, match, loaded, f"{source}: {path}")
    _check_finite(network, match, loaded, masks, f"{source}: {path}")
    return _describe(path, match, expected, loaded, fresh, fresh_classifier)


def is_mask(buffer: Tensor) -> bool:
    """Return whether all values of a buffer are finite or -inf, and some are -inf.

    Attention masks are. Statistics of a network that diverges have NaN or +inf as well.
    """
    return bool((buffer.isfinite() | buffer.isneginf()).all() and buffer.isneginf().any())


def _find(
    content: Any, expected: Mapping[str, Any], path: Path, source: str, key: str | None
) -> Match:
    """Return the best match; UsageError if there is none, or several."""
    found = matches(content, expected, key)
    if not found and key is not None:
        there = labels(content)
        words = f"state dicts: {_some(there, 6)}" if there else "no dict inside it"
        raise UsageError(
            f"{source}_key: {path} has no state dict {key!r}{nearest(key, there)} ({words})"
        )
    if not found:
        holds = f"a {type(content).__name__}"
        if isinstance(content, dict):
            holds += f" with {_some([str(k) for k in content], 6)}" if content else " with nothing"
        raise UsageError(f"{source}: {path} holds no state dict, but {holds}")
    best = found[0]
    same_rank = [m for m in found if m.rank == best.rank] if best.names_fit else []
    if rivals := [m for m in same_rank if not _are_equal(m, best)]:
        several = list(dict.fromkeys([best.label, *(m.label for m in rivals)]))
        raise UsageError(
            f"{source}_key: {path} holds several state dicts that fit, with different values: "
            f"{_some([label or 'the outermost' for label in several], 6)}; name one"
        )
    return best


def _translated(network: nn.Module, match: Match) -> Match | None:
    """Return the match after the network has renamed entries itself; None if it cannot.

    Modules may accept the names of their older releases, as torchvision's vision transformers do.
    """
    floats = [name for name in match.renamed if name.rpartition(".")[2] not in COUNTERS]
    if any(kind(match.renamed[name]) != "float" for name in floats):
        return None
    try:
        trial = copy.deepcopy(network)
        # A plain dict has no versions, which modules take for the oldest one.
        result = trial.load_state_dict(dict(match.renamed), strict=False)
    except Exception:  # another shape, a network that cannot be copied, or the user's own hooks
        return None
    if result.missing_keys or result.unexpected_keys:
        return None
    (found,) = matches(trial.state_dict(), network.state_dict())[:1]
    return replace(found, label=match.label, left_out=match.left_out)


def _are_equal(one: Match, other: Match) -> bool:
    """Return whether two matches would load the same values."""

    def same(a: Any, b: Any) -> bool:
        if a is b:
            return True
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return type(a) is type(b) and _are_equal_extras(a, b)
        return a.dtype == b.dtype and torch.equal(a.to_dense(), b.to_dense())

    values = one.values, other.values
    return values[0].keys() == values[1].keys() and all(
        same(value, values[1][name]) for name, value in values[0].items()
    )


def _are_equal_extras(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # dicts of tensors
        return False


def _classes_of_classifier(match: Match, expected: Mapping[str, Any], classes: int) -> int | None:
    """Return the file's number of classes if only classifiers have another shape, else None.

    Their shapes differ in one dimension, which is `classes` long here. It is the first one, or the
    last one of a single matrix. A hidden layer that is `classes` wide here would differ in two
    matrices: in the rows of its own, and in the columns of the next one.
    """
    numbers, columns, matrices = set(), 0, 0
    for name in match.misfits:
        there, here = match.values[name], expected[name]
        if kind(there) != kind(here) or is_lazy(here) or there.dim() != here.dim():
            return None
        differing = [d for d in range(here.dim()) if there.shape[d] != here.shape[d]]
        if len(differing) != 1 or here.shape[differing[0]] != classes:
            return None
        numbers.add(there.shape[differing[0]])
        matrices += here.dim() > 1
        columns += differing[0] > 0
        if differing[0] not in (0, here.dim() - 1):
            return None
    if len(numbers) != 1 or (columns and matrices > 1):
        return None
    return int(numbers.pop())


def _copy(network: nn.Module, match: Match, loaded: Sequence[str], where: str) -> None:
    """Copy entries of the file into the network; what is not loaded keeps its values."""
    state = network.state_dict()
    for name in loaded:
        there, here = match.values[name], state[name]
        if isinstance(there, Tensor) and not is_extra(name):
            there = there.to_dense()
            state[name] = there if is_lazy(here) else there.reshape(here.shape)
        else:
            state[name] = there
    try:
        with own_code_errors(f"{where} cannot be loaded"):
            network.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{where} cannot be loaded: {first_line(error)}") from error


def _check_finite(
    network: nn.Module, match: Match, loaded: Sequence[str], masks: set[str], where: str
) -> None:
    """UsageError if values are not finite in the network's precision.

    masks: buffers in which -inf is meant.
    """
    state = network.state_dict()

    def is_bad(name: str) -> bool:
        value = state[name]
        if kind(value) not in ("float", "complex") or value.isfinite().all():
            return False
        return not (name in masks and is_mask(value))

    if bad := [match.names[name] for name in loaded if is_bad(name)]:
        raise UsageError(
            f"{where} has values that are not finite (NaN or infinity) in {len(bad)} of "
            f"{len(loaded)} entries: {_some(bad)}; use weights from before the training diverged"
        )


def _describe_misfit(match: Match, expected: Mapping[str, Any]) -> str:
    """Say how many entries differ in which way, with a few names."""
    parts = []
    if match.missing:
        parts.append(f"{len(match.missing)} missing in the file ({_some(match.missing)})")
    if match.unexpected:
        parts.append(f"{len(match.unexpected)} not in the network ({_some(match.unexpected)})")
    if match.misfits:

        def compared(name: str) -> str:
            there, here = _form(match.values[name]), _form(expected[name])
            return f"{name} is {there} in the file and {here} in the network"

        parts.append(
            f"{len(match.misfits)} of another shape or type "
            f"({_some(match.misfits, describe=compared)})"
        )
    fitting = len(match.names) - len(match.misfits)
    where = f" (compared with {match.label} of the file)" if match.label else ""
    return f"{', '.join(parts)}; {fitting} of {len(expected)} entries fit{where}"


def _describe(
    path: Path,
    match: Match,
    expected: Mapping[str, Any],
    loaded: Sequence[str],
    fresh: Sequence[str],
    fresh_classifier: bool,
) -> str:
    """Say what was loaded, in one line."""
    words = [f"{len(loaded)} of {len(expected)} entries from {path}"]
    if match.label:
        words.append(f"found in {match.label}")
    for there, here in match.renamings()[:SHOWN]:
        removed, added = there and f"prefix {there}. removed", here and f"prefix {here}. added"
        words.append(", ".join(word for word in (removed, added) if word))
    pairs = [(match.values[name], expected[name]) for name in loaded]
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    types = {a.dtype for a, b in tensors if a.dtype != b.dtype}
    if types:
        words.append(f"converted from {_some(sorted(_word(dtype) for dtype in types))}")
    if fresh:
        words.append(f"fresh: {_some(fresh, 6)}")
    elif fresh_classifier:
        words.append("fresh: none, because the classifier fits")
    if match.absent:
        words.append(f"not in the file: {_some(match.absent)}")
    if match.left_out:
        words.append(f"not used: {_some(match.left_out)}")
    return "; ".join(words)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _form(value: Any) -> str:
    """Describe a tensor by shape and type, and any other value by its type."""
    if not isinstance(value, Tensor) or kind(value).startswith("a "):
        return kind(value)
    if is_lazy(value):
        return "not built yet"
    return f"{tuple(value.shape)} {_word(value.dtype)}"


def _some(names: Sequence[str], most: int = SHOWN, describe: Callable[[str], str] = str) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(describe(name) for name in names[:most]) + more
