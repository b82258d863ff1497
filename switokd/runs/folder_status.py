"""The status of a run from its folder alone: for a run whose coordinator is gone.

Imports neither torch nor the configuration, so that `switokd status` answers at once.

Not covered: what the ranks are doing, which only a coordinator knows.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from switokd.errors import UsageError
from switokd.runs.json_lines import read_lines

MOST_BYTES = 20_000_000
"""Longer records are read from their end only: then shares of steps are left out."""
FILES = ("config.yaml", "run.json", "summary.json")


def is_run_folder(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    return any((path / name).is_file() for name in FILES)


def identity_of(folder: Path) -> dict[str, Any]:
    """Return the content of run.json: `run_id`, `epoch`, `coordinator`; empty if there is none."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def folder_status(folder: Path) -> dict[str, Any]:
    """Return the document of the run in a folder, with the keys of `run_view.py`.

    The state is "finished", "training" while a process trains in the folder, or "interrupted".
    UsageError if files of the folder cannot be read.
    """
    identity = identity_of(folder)
    try:
        summary = _json(folder / "summary.json")
        starts = read_lines(folder / "attempts.jsonl")
        epochs = read_lines(folder / "metrics.jsonl")
        decisions, is_whole = _decisions(folder / "decisions.jsonl")
        config = _config(folder / "config.yaml")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: this run folder is damaged: {error}") from None
    is_finished = bool(summary) and not is_locked(folder)
    state = "finished" if is_finished else "training" if is_locked(folder) else "interrupted"
    last_step = decisions[-1]["step"] if decisions else 0
    begun = [line["started"] for line in starts if "started" in line]
    ended = [line["finished"] for line in starts if "finished" in line]
    pairs = _pairs(decisions, is_whole)
    schedule = config.get("schedule") or {}
    length = schedule.get("epochs"), schedule.get("max_steps")
    return {
        "run_id": identity.get("run_id"),
        "state": state,
        "coordinator": None,
        "folder": str(folder),
        "epoch": identity.get("epoch"),
        "strategy": (config.get("distillation") or {}).get("strategy"),
        "started_at": begun[0] if begun else None,
        "ended_at": _ended_at(folder, state, ended),
        "failure": None,
        "last_step": last_step,
        "planned_steps": last_step if is_finished else planned_steps(epochs, *length),
        "training_epoch": _training_epoch(epochs, last_step),
        "planned_epochs": None if schedule.get("max_steps") else schedule.get("epochs"),
        "recorded_step": last_step,
        "decided_alone_steps": summary.get("steps_decided_alone"),
        "pairs": pairs,
        "networks": _networks(config, summary, pairs, epochs),
        "ranks": [],
        "connected_ranks": [],
        "waiting_for": [],
        "commands": [],
        "commands_truncated": False,
    }


def _ended_at(folder: Path, state: str, finished: Sequence[float]) -> float | None:
    """Return when the run ended: of an interrupted one, when it wrote its last decision."""
    if state == "finished":
        return finished[-1] if finished else None
    record = folder / "decisions.jsonl"
    return record.stat().st_mtime if state == "interrupted" and record.exists() else None


def planned_steps(
    metrics: Iterable[Mapping[str, Any]], epochs: int | None, max_steps: int | None
) -> int | None:
    """Return the last step of the training; None before an epoch has ended, or if they differ.

    metrics: lines of metrics.jsonl. epochs, max_steps: of the schedule.
    """
    per_epoch = {
        line["step"] / line["epoch"] for line in metrics if line.keys() >= {"step", "epoch"}
    }
    if len(per_epoch) != 1:
        return None
    steps = round(per_epoch.pop() * (epochs or 0))
    return min(steps, max_steps or steps) or None


def _training_epoch(epochs: Sequence[Mapping[str, Any]], last_step: int) -> int | None:
    """Return the epoch of the last step; None if it is not known."""
    if not epochs or (epoch := epochs[-1].get("epoch")) is None:
        return None
    is_in_next: bool = last_step > epochs[-1].get("step", last_step)
    return int(epoch) + is_in_next


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with path.open(encoding="utf-8") as file:
        found = yaml.load(file, loader)
    return found if isinstance(found, dict) else {}


def is_locked(folder: Path) -> bool:
    """Return whether a process trains in the folder; it holds a lock on config.yaml."""
    with suppress(FileNotFoundError), (folder / "config.yaml").open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def _decisions(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the lines of the decision log, and whether these are all; else its last ones."""
    if not path.exists():
        return [], True
    size = os.path.getsize(path)
    if size <= MOST_BYTES:
        return read_lines(path), True
    with path.open("rb") as file:
        file.seek(size - MOST_BYTES // 100)
        lines = file.read().splitlines(keepends=True)[1:]
    return [json.loads(line) for line in lines if line.endswith(b"\n")], False


def _pairs(decisions: Iterable[dict[str, Any]], is_whole: bool) -> list[dict[str, Any]]:
    last: dict[tuple[str, str], dict[str, Any]] = {}
    steps: dict[tuple[str, str], int] = {}
    experts: dict[tuple[str, str], int] = {}
    switches: dict[tuple[str, str], int] = {}
    for line in decisions:
        pair = line["teacher"], line["student"]
        before = last.get(pair)
        steps[pair] = steps.get(pair, 0) + 1
        experts[pair] = experts.get(pair, 0) + (line["mode"] == "expert")
        switches[pair] = switches.get(pair, 0) + bool(before and before["mode"] != line["mode"])
        last[pair] = line
    return [
        {
            "teacher": pair[0],
            "student": pair[1],
            "gap": line["gap"],
            "threshold": line["delta"],
            "margin": line["gap"] - line["delta"],
            "mode": line["mode"],
            "expert_ratio": experts[pair] / steps[pair] if is_whole else None,
            "switches": switches[pair] if is_whole else None,
            "held": line.get("held", False),
            "threshold_scale": line.get("delta_scale") or 1.0,
        }
        for pair, line in last.items()
    ]


def _networks(
    config: dict[str, Any],
    summary: dict[str, Any],
    pairs: Iterable[dict[str, Any]],
    epochs: Iterable[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return the networks; accuracies go from 0 to 1, in the files they are in percent."""
    last = {line["network"]: line for line in epochs}
    modes: dict[str, list[bool]] = {}
    for pair in pairs:
        modes.setdefault(pair["teacher"], []).append(pair["mode"] == "expert")
    views = []
    for name, settings in (config.get("networks") or {}).items():
        measured = (summary.get("networks") or {}).get(name, {})
        numbers = last.get(name, {})
        role = measured.get("role") or (settings or {}).get("role", "unknown")
        is_teacher, steps = role == "teacher", measured.get("steps")
        views.append(
            {
                "name": name,
                "role": role,
                "ranks": [],
                "is_paused": all(modes[name]) if is_teacher and name in modes else None,
                "paused_ratio": measured["steps_paused"] / steps if is_teacher and steps else None,
                "samples": measured.get("samples"),
                "loss": numbers.get("loss"),
                "accuracy": _share(numbers.get("train_top1")),
                "test_accuracy": _share(numbers.get("test_top1")),
            }
        )
    return views


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100
