"""Planned faults: what happens to which process, in which phase of which step; each happens once.

A plan is a folder with one file per fault. The process that a fault hits renames its file first, so
no fault happens twice, also not after a restart.

Not covered: where the phases lie (`moments.py`); what a fault does (`actions.py`, `outside.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One fault; it happens at the first moment that fits."""

    kind: str
    phase: str
    step: int = 0
    """Not before this step has begun; 0: at once."""
    rank: int = 0
    seconds: float = 0.3
    """How long it lasts, for a fault that ends by itself."""
    start: int = 1
    """Not before this start of the run, counted from 1."""


def write_plan(folder: Path, faults: Sequence[Fault]) -> None:
    """Write a plan into a new folder."""
    folder.mkdir(parents=True)
    for number, fault in enumerate(faults):
        (folder / f"{number:03d}.json").write_text(json.dumps(asdict(fault)))


def read_plan(folder: Path) -> dict[Path, Fault]:
    """Return the faults that have not happened yet."""
    return {path: Fault(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))}


def take(path: Path) -> bool:
    """Mark a fault as happening; False if it has happened before."""
    try:
        path.rename(path.with_suffix(".used"))
    except FileNotFoundError:
        return False
    return True


def used(folder: Path) -> list[Fault]:
    """Return the faults that have happened."""
    return [Fault(**json.loads(path.read_text())) for path in sorted(folder.glob("*.used"))]
