"""bench/results.json: every figure with where it comes from, and merging into what is there.

Figures of one file are of one machine with one set of versions, but not of one hour: each says of
which commit it is, when it was measured and what others took of the machine meanwhile.

Not covered: whether figures of two commits can be held against each other; that is the reader's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import machine
from bench.figures import Figure

SAME = ("hardware", "versions", "quick")
"""What all figures of a file have in common."""
AT_ONCE = 0.1
"""Seconds; a figure that comes so soon after another is of the same measurement."""


class Results:
    """The file as it grows. `merge`: on top of what is in it already."""

    def __init__(self, path: Path, quick: bool, merge: bool = False) -> None:
        """ValueError, with a line, for a file that these figures cannot be merged into."""
        self.path = path
        self.load_before = machine.load()
        self.failed: dict[str, str] = {}
        """By part that failed this time."""
        self.taken: dict[str, float | None] = {}
        """By figure: what others took of the cores while it was measured, 0 to 1, if known."""
        self._content = {**machine.describe(), "quick": quick, "figures": {}, "failed": {}}
        if merge and path.exists():
            self._content = _earlier(path, self._content)

    def add(self, part: str, figures: Iterable[Figure]) -> Iterator[Figure]:
        """Pass on a part's figures; each is in the file once it is there.

        What the part left in the file before is gone once it has given all.
        """
        new: set[str] = set()
        provenance: dict[str, Any] = {}
        others, begun, started = machine.Others(), self._provenance(part), time.monotonic()
        self._content["failed"][part] = "it was not ended"
        for figure in figures:
            seconds = time.monotonic() - started
            if seconds > AT_ONCE or not provenance:
                share = others.share()
                provenance = {**begun, "seconds": round(seconds, 1)}
                provenance["taken_by_others"] = None if share is None else round(share, 3)
            self.taken[figure.name] = provenance["taken_by_others"]
            self._content["figures"][figure.name] = figure.record() | {"provenance": provenance}
            self._write()
            new.add(figure.name)
            yield figure
            others, begun, started = machine.Others(), self._provenance(part), time.monotonic()
        self._content["figures"] = {
            name: record
            for name, record in self._content["figures"].items()
            if name in new or record["provenance"]["part"] != part
        }
        self._content["failed"].pop(part, None)
        self._write()

    def fail(self, part: str, why: str) -> None:
        """Keep why a part ended early; what it gave until then stays."""
        self.failed[part] = self._content["failed"][part] = why
        self._write()

    def _provenance(self, part: str) -> dict[str, Any]:
        """Where a figure comes from whose measuring begins now.

        The load includes what the benchmark itself did in the minute before, but for that at
        program start.
        """
        at_start = {"load_1_minute": machine.load(), "load_at_program_start": self.load_before}
        return {"part": part, **machine.source(), **at_start}

    def _write(self) -> None:
        self.path.write_text(json.dumps(self._content, indent=1) + "\n")


def _earlier(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """Read a file to merge into; ValueError, with a line, unless it is of the same conditions."""
    try:
        there = json.loads(path.read_text())
        figures = there["figures"].values()
        is_ours = isinstance(there["failed"], dict) and all("provenance" in f for f in figures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{path} holds no figures that say where they come from; leave out --merge"
        )
    for key, mine in _flat({key: here[key] for key in SAME}).items():
        theirs = _flat({key: there.get(key) for key in SAME}).get(key)
        if theirs != mine:
            raise ValueError(
                f"{path} has other conditions: {key} is {theirs!r} there and {mine!r} here; leave "
                "out --merge, or give another --out"
            )
    return dict(there)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All leaves, as "hardware.cpu"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
