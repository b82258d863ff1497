"""bench/results.json: all figures with their provenance; merging into an existing file.

All figures of a file come from one machine with one set of versions, but from different times.
Each figure therefore has its commit, its date and the CPU time that other processes took meanwhile.

Not covered: whether figures of two commits are comparable; the reader must judge.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import machine
from bench.figures import Figure

SHARED_KEYS = ("hardware", "versions", "quick")
"""Keys whose values are the same for all figures of a file."""
SAME_MEASUREMENT_SECONDS = 0.1
"""A figure that follows another one this fast belongs to the same measurement."""


class Results:
    """The results file, written after every figure.

    merge: keep the figures that the file contains already.
    """

    def __init__(self, path: Path, quick: bool, merge: bool = False) -> None:
        """ValueError if the figures cannot be merged into the file."""
        self.path = path
        self.load_before = machine.load()
        self.failed: dict[str, str] = {}
        """Reasons of failures in this run of the benchmark, by part."""
        self.taken: dict[str, float | None] = {}
        """Share of the cores that other processes took, 0 to 1, by figure; None if unknown."""
        self._content = {**machine.describe(), "quick": quick, "figures": {}, "failed": {}}
        if merge and path.exists():
            self._content = _read_existing(path, self._content)

    def add(self, part: str, figures: Iterable[Figure]) -> Iterator[Figure]:
        """Write each figure of a part to the file, and yield it.

        After the last figure, older figures of the part are removed from the file.
        """
        new: set[str] = set()
        provenance: dict[str, Any] = {}
        others, begun, started = machine.Others(), self._provenance(part), time.monotonic()
        self._content["failed"][part] = "it did not finish"
        for figure in figures:
            seconds = time.monotonic() - started
            if seconds > SAME_MEASUREMENT_SECONDS or not provenance:
                share = others.share()
                provenance = {**begun, "seconds": round(seconds, 1)}
                provenance["taken_by_others"] = None if share is None else round(share, 3)
            self.taken[figure.name] = provenance["taken_by_others"]
            self._content["figures"][figure.name] = figure.to_json() | {"provenance": provenance}
            self._write()
            new.add(figure.name)
            yield figure
            others, begun, started = machine.Others(), self._provenance(part), time.monotonic()
        self._content["figures"] = {
            name: figure
            for name, figure in self._content["figures"].items()
            if name in new or figure["provenance"]["part"] != part
        }
        self._content["failed"].pop(part, None)
        self._write()

    def fail(self, part: str, why: str) -> None:
        """RunResult the reason of a failed part; figures that it has yielded stay in the file."""
        self.failed[part] = self._content["failed"][part] = why
        self._write()

    def _provenance(self, part: str) -> dict[str, Any]:
        """Provenance of a figure whose measurement starts now.

        `load_1_minute` includes the benchmark's own load of the last minute;
        `load_at_program_start` does not.
        """
        at_start = {"load_1_minute": machine.load(), "load_at_program_start": self.load_before}
        return {"part": part, **machine.source(), **at_start}

    def _write(self) -> None:
        self.path.write_text(json.dumps(self._content, indent=1) + "\n")


def _read_existing(path: Path, current: dict[str, Any]) -> dict[str, Any]:
    """Read a file to merge into. ValueError if machine, versions or `quick` differ."""
    try:
        existing = json.loads(path.read_text())
        figures = existing["figures"].values()
        is_ours = isinstance(existing["failed"], dict) and all("provenance" in f for f in figures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} has no figures with their provenance; leave out --merge")
    existing_values = _flatten({key: existing.get(key) for key in SHARED_KEYS})
    for key, value in _flatten({key: current[key] for key in SHARED_KEYS}).items():
        if existing_values.get(key) != value:
            raise ValueError(
                f"{path} has other conditions: {key} is {existing_values.get(key)!r} there and "
                f"{value!r} here; leave out --merge, or choose another --out"
            )
    return dict(existing)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by dotted key, for example "hardware.cpu"."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
