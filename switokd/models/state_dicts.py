"""Finds the state dict that fits a network, wherever a training script has put it in a file.

A file may hold several: in dicts inside dicts (`state_dict`, `model`, ...), and under prefixes of
the names (`module.`, `_orig_mod.`, `model.`, ...). What counts is which one has the network's
entries, so the dicts need no known names. A prefix is removed if all names of the dict have it, if
it is made of `PARTS`, or if the user names it. The network's own names may have a prefix as well.

Not covered: names that differ in another way; lists of state dicts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from switokd.models.own_state import is_extra

Entries = Mapping[str, Any]

WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
"""Components of names that PyTorch's own wrappers insert; ignored wherever they stand."""

PARTS = (
    *("model", "net", "network", "backbone", "encoder", "student", "teacher"),
    *("ema", "model_ema", "ema_model", "averaged_model"),
)
"""Components of prefixes beside which a file may hold other entries, of a loss for instance."""

AVERAGE = re.compile(r"(?:^|[._-])(?:ema|swa|avg|averaged?|shadow)(?=$|[._-])")
"""Names of moving averages, which are taken only if nothing else fits."""

COUNTERS = ("num_batches_tracked",)
"""Last components of entries that old files lack; they matter for BatchNorm without momentum."""
LEFTOVERS = (*COUNTERS, "total_ops", "total_params", "n_averaged")
"""Last components of entries that a file may have in excess: thop's, and AveragedModel's."""

DEEPEST = 5
"""Dicts inside dicts that are looked at; a pickled dict may contain itself."""


@dataclass(frozen=True)
class Match:
    """How one state dict of a file fits a network. Names are the network's unless said."""

    label: str
    """Keys of the dicts and the prefix that lead to it in the file, with dots between them."""
    names: Mapping[str, str]
    """The file's name of each entry that both have."""
    values: Entries
    """The file's value of each entry that both have."""
    missing: Sequence[str]
    absent: Sequence[str]
    """Entries that the file may lack: counters, and other names of an entry that it has."""
    unexpected: Sequence[str]
    """The file's names of entries that the network does not have."""
    misfits: Sequence[str]
    """Entries of another shape, or of a type that cannot be converted."""
    left_out: Sequence[str]
    """The file's names of entries beside the prefix."""
    renamed: Entries
    """All of the file's entries under the prefix, with the network's prefix."""

    @property
    def names_fit(self) -> bool:
        """Whether the network's entries are there, and no others."""
        return not self.missing and not self.unexpected

    @property
    def is_average(self) -> bool:
        """Whether it is a moving average by its name."""
        return bool(AVERAGE.search(self.label))

    @property
    def rank(self) -> tuple[bool, int, bool, int]:
        """Sort key: what fits comes first, then most common entries, then what is no average."""
        problems = len(self.missing) + len(self.unexpected) + len(self.misfits)
        common = len(self.names) - len(self.misfits)
        return problems > 0, -common if problems else 0, self.is_average, problems

    def renamings(self) -> list[tuple[str, str]]:
        """Return what the file's names have in place of what the network's have, at most once."""
        both = {_difference(there, here) for here, there in self.names.items()}
        return sorted(both - {("", "")})


def matches(content: Any, expected: Entries, key: str | None = None) -> list[Match]:
    """Return how the state dicts in a file's content fit the network's, the best first.

    expected: the network's state dict. key: label of the one that is meant, or its beginning;
    None: any. Empty if there is none.
    """
    own = _canonical(expected)
    found = [
        match
        for label, entries in _state_dicts(content, expected)
        for match in _matches_of(label, entries, expected, own, key)
        if key is None or f"{match.label}.".startswith(f"{key}.")
    ]
    return sorted(found, key=lambda match: match.rank)


def labels(content: Any) -> list[str]:
    """Return where a file's content holds dicts with tensors."""
    return [label for label, _ in _state_dicts(content, {}) if label]


def kind(value: Any) -> str:
    """Return what a value holds: float, complex, integer, or words for what cannot be loaded."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.is_meta:
        return "a tensor without values"
    if value.is_quantized:
        return "a quantized tensor"
    if value.is_complex():
        return "complex"
    return "float" if value.is_floating_point() else "integer"


def fits(there: Any, here: Any) -> bool:
    """Return whether a file's value can replace the network's and keep its meaning.

    Floats may have another precision. Integers must keep their values. They never become floats:
    they may be quantized weights.
    """
    if not isinstance(here, Tensor):
        return type(there) is type(here)
    if kind(there).startswith("a ") or type(there) not in (Tensor, Parameter):
        return False
    if is_lazy(here):
        return kind(there) == "float"
    if there.shape != here.shape and {tuple(there.shape), tuple(here.shape)} != {(), (1,)}:
        return False
    if kind(here) != "integer" or there.is_complex():
        return kind(there) == kind(here)
    there = there.to_dense()
    return bool((there.to(here.dtype).to(there.dtype) == there).all())


def _state_dicts(
    value: Any, expected: Entries, label: str = "", depth: int = 0
) -> Iterator[tuple[str, Entries]]:
    """Yield the dicts with tensors, and their labels, outside first."""
    if not isinstance(value, Mapping) or depth > DEEPEST:
        return
    items = {key: inner for key, inner in value.items() if isinstance(key, str)}
    if any(isinstance(inner, Tensor) for inner in items.values()):
        yield (
            label,
            {
                key: inner
                for key, inner in items.items()
                if isinstance(inner, Tensor) or key in expected or is_extra(key)
            },
        )
    for key, inner in items.items():
        yield from _state_dicts(inner, expected, f"{label}.{key}" if label else key, depth + 1)


def _matches_of(
    label: str, entries: Entries, expected: Entries, own: Mapping[str, str], key: str | None
) -> Iterator[Match]:
    """Yield the matches of one state dict, for each prefix on the file's and the network's side."""
    theirs = _canonical(entries)
    prefixes = dict.fromkeys([*_leading(theirs), *_of_parts(theirs)])
    if key is not None and f"{key}.".startswith(f"{label}." if label else ""):
        prefixes[f"{key}."[len(label) + bool(label) :]] = None
    for prefix in prefixes:
        under = {
            name[len(prefix) :]: raw for name, raw in theirs.items() if name.startswith(prefix)
        }
        left_out = [raw for name, raw in theirs.items() if not name.startswith(prefix)]
        for own_prefix in _leading(own):
            core = {name[len(own_prefix) :]: raw for name, raw in own.items()}
            joined = ".".join(part for part in (label, prefix[:-1]) if part)
            renamed = {f"{own_prefix}{name}": entries[raw] for name, raw in under.items()}
            yield _match(joined, entries, expected, under, core, left_out, renamed)


def _match(
    label: str,
    entries: Entries,
    expected: Entries,
    under: Mapping[str, str],
    core: Mapping[str, str],
    left_out: Sequence[str],
    renamed: Entries,
) -> Match:
    """Compare the names under a prefix with the network's, both without their prefixes."""
    names = {core[name]: under[name] for name in core if name in under}
    loaded = {_memory(expected[name]) for name in names} - {None}
    lacking = [raw for name, raw in core.items() if name not in under]
    absent = [
        name for name in lacking if _last(name) in COUNTERS or _memory(expected[name]) in loaded
    ]
    return Match(
        label=label,
        names=names,
        values={name: entries[there] for name, there in names.items()},
        missing=[name for name in lacking if name not in absent],
        absent=absent,
        unexpected=[
            raw for name, raw in under.items() if name not in core and _last(raw) not in LEFTOVERS
        ],
        misfits=[
            name
            for name, there in names.items()
            if not is_extra(name) and not fits(entries[there], expected[name])
        ],
        left_out=[name for name in left_out if _last(name) not in LEFTOVERS],
        renamed=renamed,
    )


def _canonical(names: Iterable[str]) -> dict[str, str]:
    """Return names without the components of wrappers, each with the full name.

    The names stay as they are if two of them would become the same.
    """
    names = list(names)
    short = {}
    for name in names:
        *path, last = name.split(".")
        short[".".join([*(part for part in path if part not in WRAPPERS), last])] = name
    return short if len(short) == len(names) else {name: name for name in names}


def _leading(names: Mapping[str, str]) -> list[str]:
    """Return the prefixes that all names have, from none to the longest."""
    paths = [name.split(".")[:-1] for name in names if _last(name) not in LEFTOVERS]
    prefixes = [""]
    for parts in zip(*paths):  # noqa: B905, the shortest path ends it
        if len(set(parts)) > 1:
            break
        prefixes.append(f"{prefixes[-1]}{parts[0]}.")
    return prefixes


def _of_parts(names: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    """Yield the prefixes made of `PARTS` that some names have."""
    for part in PARTS:
        longer = f"{prefix}{part}."
        if any(name.startswith(longer) for name in names):
            yield longer
            yield from _of_parts(names, longer)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _memory(value: Any) -> tuple[Any, ...] | None:
    """Return what tells tied weights from others; None if the value has no memory of its own."""
    if kind(value).startswith("a ") or is_lazy(value) or value.layout != torch.strided:
        return None
    return value.data_ptr(), value.shape, value.stride()


def _difference(there: str, here: str) -> tuple[str, str]:
    """Return the components in which two names differ, between those that they share."""
    a, b = there.split("."), here.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop(), b.pop()
    while a and b and a[0] == b[0]:
        del a[0], b[0]
    return ".".join(a), ".".join(b)
