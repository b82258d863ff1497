"""What a report shows of a run, read from its folder. Imported without torch.

A run may still go on, may have been killed, or may be of one process: what a folder does not hold
yet is left out, never guessed.

Not covered: networks, weights and data of a run (`runs/run.py`).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from switokd.config.config import Config
from switokd.config.run_file import load
from switokd.config.run_folders import config_file
from switokd.errors import UsageError
from switokd.runs.folder_status import is_locked

State = Literal["finished", "training", "stopped"]


@dataclass(frozen=True)
class PairRecord:
    """All decisions of one pair so far, in the order of the steps; arrays of `n` steps."""

    teacher: str
    student: str
    steps: NDArray[np.int64]
    gap: NDArray[np.float64]
    delta: NDArray[np.float64]
    """The threshold."""
    expert: NDArray[np.bool_]
    """Whether the pair was in expert mode."""
    is_better: NDArray[np.bool_]
    """Whether the teacher was the better one: e_t < e_s."""

    @property
    def name(self) -> str:
        """Teacher and student, for a title."""
        return f"{self.teacher} and {self.student}"

    @property
    def not_better(self) -> NDArray[np.bool_]:
        """Steps whose gap was too large, but whose teacher was not better, and learned."""
        return (self.gap > self.delta) & ~self.expert & ~self.is_better

    @property
    def switches(self) -> int:
        """Number of steps whose mode was another than that of the step before."""
        return int(np.count_nonzero(np.diff(self.expert)))


@dataclass(frozen=True)
class TeacherRecord:
    """What one teacher did in each step; arrays of `n` steps."""

    name: str
    steps: NDArray[np.int64]
    paused: NDArray[np.bool_]
    """All pairs of the teacher were in expert mode."""
    not_better: NDArray[np.bool_]
    """The gap to a student was too large, but the teacher was not better, and learned."""


@dataclass(frozen=True)
class RunRecord:
    """One run, as far as its folder tells."""

    label: str
    """Names the run in the report; different for each run of a report."""
    folder: Path
    config: Config
    state: State
    """training: a process of this machine trains in the folder now."""
    summary: Mapping[str, Any] | None
    """Content of summary.json; None until the run has finished."""
    metrics: list[dict[str, Any]]
    pairs: list[PairRecord]
    starts: list[dict[str, Any]]
    """Lines of attempts.jsonl."""
    commands: list[dict[str, Any]]
    """Lines of commands.jsonl: what operators asked for."""
    warnings: list[dict[str, Any]]
    """Lines of warnings.jsonl: what the run has warned of."""
    set_aside: int
    """Number of starts whose record could not be continued, and was kept elsewhere."""

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 before the first one."""
        decided = max((int(pair.steps[-1]) for pair in self.pairs), default=0)
        return max(decided, max((line["step"] for line in self.metrics), default=0))

    @property
    def teachers(self) -> list[TeacherRecord]:
        """The teachers with a recorded pair, in the order of the run file."""
        found = []
        for name in self.config.topology.teachers:
            pairs = [pair for pair in self.pairs if pair.teacher == name]
            if not pairs:
                continue
            # All pairs of a step are written by one call; a torn last line may leave one out.
            count = min(len(pair.steps) for pair in pairs)
            paused = np.logical_and.reduce([pair.expert[:count] for pair in pairs])
            above = np.logical_or.reduce([pair.not_better[:count] for pair in pairs])
            found.append(TeacherRecord(name, pairs[0].steps[:count], paused, above & ~paused))
        return found


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """Read the runs of a report. UsageError if a folder holds no run, or is named twice."""
    labels = _labels(folders)
    return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _labels(folders: list[Path]) -> list[str]:
    """Return the last parts of the folders' paths, as many as tell the folders apart."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise UsageError(f"{folder} is named twice; name each run once")
    for parts in range(1, max(len(path.parts) for path in resolved) + 1):
        labels = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read(folder: Path, label: str) -> RunRecord:
    config = load(str(config_file(folder)))
    summary = None
    with suppress(FileNotFoundError):
        summary = _parsed(folder / "summary.json", (folder / "summary.json").read_bytes())
    return RunRecord(
        label=label,
        folder=folder,
        config=config,
        state="finished" if summary else "training" if is_locked(folder) else "stopped",
        summary=summary,
        metrics=list(_lines(folder / "metrics.jsonl")),
        pairs=_pairs(folder / "decisions.jsonl"),
        starts=list(_lines(folder / "attempts.jsonl")),
        commands=list(_lines(folder / "commands.jsonl")),
        warnings=list(_lines(folder / "warnings.jsonl")),
        set_aside=len(list(folder.glob("set-aside-*"))),
    )


def _pairs(path: Path) -> list[PairRecord]:
    """Read the decision log line by line: a long run's would not fit in memory as dicts."""
    columns: dict[tuple[str, str], list[array[Any]]] = {}
    for line in _lines(path):
        key = line["teacher"], line["student"]
        if key not in columns:
            columns[key] = [array(code) for code in "qddbb"]
        is_better = line["e_t"] < line["e_s"]
        values = (line["step"], line["gap"], line["delta"], line["mode"] == "expert", is_better)
        for column, value in zip(columns[key], values, strict=True):
            column.append(value)
    types = (np.int64, np.float64, np.float64, np.bool_, np.bool_)
    return [
        PairRecord(*key, *(np.frombuffer(c, t) for c, t in zip(found, types, strict=True)))
        for key, found in columns.items()
    ]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a .jsonl file, but not a last one that is still being written."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _parsed(path, line, f", line {number}")


def _parsed(path: Path, text: bytes, place: str = "") -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{path}{place} is damaged: it is no JSON object")
    return content
