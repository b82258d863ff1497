"""Finds where an interrupted run continues, and cuts its record back to that step.

Not covered: restoring the state (`training/checkpoint.py`); starting the job again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from switokd.config.config import Config
from switokd.config.dotted import flatten
from switokd.config.run_file import load
from switokd.distillation.decision import Mode
from switokd.errors import UsageError
from switokd.runs.checkpoints import remove, stored
from switokd.runs.json_lines import read_lines

MAY_DIFFER = (
    *("placement", "auto", "coordinator", "checkpoint", "resume", "device", "save_initial_weights"),
    *("schedule.epochs", "schedule.max_steps", "schedule.evaluate_every"),
    *("schedule.on_nonfinite", "schedule.max_skipped", "observers", "tracking"),
)
"""Settings, and sections of them, that may change when a run is continued."""


@dataclass(frozen=True)
class Resumption:
    """What rank 0 has found in the folder of an interrupted run."""

    folder: Path
    step: int = 0
    """The step after which the run continues; 0: from the beginning."""
    state: dict[str, Any] = field(default_factory=dict)
    """Content of the checkpoint's state.pt; empty for step 0."""
    recorded: int = 0
    """The last step of the record, which is cut back to `step`."""
    notes: Sequence[str] = ()
    """Sentences for the user: what was damaged, which settings have changed."""

    @property
    def steps_lost(self) -> int:
        """Number of recorded steps that are done again."""
        return max(self.recorded - self.step, 0)

    def describe(self, steps: int) -> list[str]:
        """Return sentences for the user. steps: of the whole run."""
        if not self.step:
            return [
                *self.notes,
                f"{self.folder} has no checkpoint that can be used: starting from the first step",
            ]
        return [*self.notes, f"continuing {self.folder} after step {self.step} of {steps}"]


def find(config: Config) -> Resumption | None:
    """Return where the run in `run_dir` continues; None if the folder holds no run.

    UsageError if it holds another run, or this run with other settings.
    """
    if config.resume != "auto" or config.run_dir is None:
        return None
    folder = Path(config.run_dir)
    if not os.path.exists(folder / "config.yaml"):  # also if its name is too long, say
        return None
    notes = _changes(load(str(folder / "config.yaml")), config, folder)
    recorded = _last_step(folder / "decisions.jsonl")
    for checkpoint in stored(folder):
        if checkpoint.step > recorded:
            notes.append(f"{checkpoint.path} is not used: the record ends at step {recorded}")
            continue
        try:
            state, _ = checkpoint.read()
        except UsageError as error:
            notes.append(f"{checkpoint.path} is not used: {error}")
            continue
        return Resumption(folder, checkpoint.step, state, recorded, notes)
    if recorded and (folder / "summary.json").exists():
        raise UsageError(
            f"run_dir: the run in {folder} is complete and has no checkpoint that can be used; "
            "starting again would remove its results: choose another run_dir, or remove the "
            f"folder. {'. '.join(notes)}".strip()
        )
    if recorded and stored(folder):
        notes.append(f"the record of {recorded} steps is kept in {_aside(folder)}")
    return Resumption(folder, recorded=recorded, notes=notes)


def _changes(before: Config, now: Config, folder: Path) -> list[str]:
    """Describe the settings that have changed; UsageError if one of them must not."""
    old, new = (_must_stay(config) for config in (before, now))
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    fixed = [key for key in differing if not _may_differ(key)]
    if fixed:
        words = ", ".join(
            f"{key} ({old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now)"
            for key in fixed
        )
        raise UsageError(
            f"run_dir: the run in {folder} cannot be continued with other settings: {words}; "
            f"leave them as they were, or choose another run_dir. These may change: "
            f"{', '.join(MAY_DIFFER)}, networks.NAME.ranks"
        )
    shown = [key for key in differing if key.startswith(("schedule.", "placement"))]
    return [f"{key} is {new.get(key)!r} from here on (it was {old.get(key)!r})" for key in shown]


def _must_stay(config: Config) -> Mapping[str, Any]:
    return flatten(json.loads(json.dumps(config.must_agree())))


def _may_differ(key: str) -> bool:
    is_rank_count = key.startswith("networks.") and key.endswith(".ranks")
    return is_rank_count or any(key == k or key.startswith(f"{k}.") for k in MAY_DIFFER)


def cut(folder: Path, step: int) -> None:
    """Remove from a run what lies behind `step`, and what only a finished run has.

    The metrics of an epoch that ends at `step` are removed too: the checkpoint is older than its
    evaluation. If no checkpoint can be used, the record and the checkpoints are kept elsewhere in
    the folder: somebody may still need them.
    """
    if not step and (damaged := stored(folder)):
        aside = _aside(folder)
        aside.mkdir()
        for name in ("decisions.jsonl", "metrics.jsonl"):
            with suppress(FileNotFoundError):
                shutil.copy(folder / name, aside)  # the file itself is open already
        for checkpoint in damaged:
            checkpoint.path.rename(aside / checkpoint.path.name)
    _cut_lines(folder / "decisions.jsonl", step)
    _cut_lines(folder / "metrics.jsonl", step - 1)
    for name in ("summary.json", "curves.png"):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in stored(folder):  # damaged, or behind the record; they would outlive good ones
        if checkpoint.step > step:
            remove(checkpoint)


def _aside(folder: Path) -> Path:
    """Return the next free name for a folder of what cannot be continued."""
    names = (folder / f"set-aside-{number}" for number in count(1))
    return next(path for path in names if not path.exists())


def paused_by_step(folder: Path, last: int) -> dict[int, list[str]]:
    """Return the teachers of each recorded step whose pairs are all in expert mode.

    last: the last step that is looked at.
    """
    modes: dict[int, dict[str, set[str]]] = {}
    for line in read_lines(folder / "decisions.jsonl"):
        if line["step"] > last:
            break
        modes.setdefault(line["step"], {}).setdefault(line["teacher"], set()).add(line["mode"])
    return {
        step: [teacher for teacher, found in teachers.items() if found == {Mode.EXPERT.value}]
        for step, teachers in modes.items()
    }


def _cut_lines(path: Path, last: int) -> None:
    """Truncate a .jsonl file before its first line of a later step, or that is torn."""
    if not path.exists():
        return
    end = 0
    with path.open("rb+") as file:
        for line in file:
            step = _step_of(line)
            if step is None or step > last:
                break
            end += len(line)
        file.truncate(end)
        os.fsync(file.fileno())


def _last_step(path: Path) -> int:
    """Return the last step of which the decision log holds whole lines; 0 if there is none."""
    last = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if (step := _step_of(line)) is None:
                    break
                last = step
    return last


def _step_of(line: bytes) -> int | None:
    """Return a line's step; None if the line is torn."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
