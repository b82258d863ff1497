"""The file commands.jsonl in the run folder: the commands that the run has taken, one a line.

    {"id": "1f", "action": "hold", "teacher": "t", "mode": "expert", "until_step": 90,
     "first_step": 38, "at": 1795000000.0, "asked_by": "operator"}

`first_step` is the step from which a command holds. A run that continues from a checkpoint has the
same commands at the same steps again, whichever checkpoint it is; so the file is never cut back. A
new run takes over a file that somebody has put into its folder: that schedules commands.

Not covered: commands that were refused, which are not noted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switokd.distillation.decision import Mode
from switokd.distillation.overrides import Action, Command, Stamped
from switokd.errors import UsageError, nearest
from switokd.runtime.durable import sync_folder

COMMANDS = "commands.jsonl"

KEYS = {
    Action.HOLD: ("teacher", "mode", "until_step"),
    Action.RELEASE: ("teacher",),
    Action.SCALE: ("teacher", "factor"),
    Action.CHECKPOINT: (),
    Action.STOP: (),
}
"""Keys of each action, besides those that all have."""
COMMON = ("id", "action", "first_step", "at", "asked_by")


def read_commands(folder: Path | None, teachers: Sequence[str] | None = None) -> list[Stamped]:
    """Return the commands of a run folder, in the order of the file; none without a file.

    A last line without its end was never taken, and is left out. teachers: those of the run; None:
    not known.
    UsageError if the file cannot be read, or asks for what the run cannot do.
    """
    if folder is None or not (path := folder / COMMANDS).exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n") or not line.strip():
            continue
        try:
            stamped = parse_command(json.loads(line), number)
            if teachers is not None and (problem := stamped.command.problem(teachers)):
                raise ValueError(problem)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        found.append(stamped)
    return found


def append_command(folder: Path, stamped: Stamped) -> None:
    """Add a command to the file, and put it on the disk; OSError leaves the file as it was."""
    line = json.dumps(_line(stamped)).encode() + b"\n"
    is_new = not (folder / COMMANDS).exists()
    with (folder / COMMANDS).open("ab+", buffering=0) as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1  # a torn line was never taken
        file.truncate(end)
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(28, os.strerror(28))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if is_new:
        sync_folder(folder)


def _line(stamped: Stamped) -> dict[str, Any]:
    command = stamped.command
    values = {
        "teacher": command.teacher,
        "mode": command.mode.value if command.mode else None,
        "until_step": command.until_step,
        "factor": command.factor,
    }
    own = {key: values[key] for key in KEYS[command.action] if values[key]}
    ends = {"first_step": stamped.first_step, "at": stamped.at, "asked_by": command.asked_by}
    return {"id": command.id, "action": command.action.value, **own, **ends}


def parse_command(line: Any, number: int) -> Stamped:
    """Return the command of a line; ValueError or TypeError says what is wrong with it."""
    if not isinstance(line, dict):
        raise TypeError("a command is a JSON object")
    name, actions = str(line.get("action")), [action.value for action in Action]
    if name not in actions:
        hint = nearest(name, actions)
        raise ValueError(f"action must be one of {', '.join(actions)}, found {name}{hint}")
    action = Action(name)
    if unknown := [key for key in line if key not in (*COMMON, *KEYS[action])]:
        allowed = ", ".join((*COMMON, *KEYS[action]))
        raise ValueError(f"unknown key {unknown[0]}; {name} has {allowed}")
    mode = line.get("mode")
    if mode is not None and mode not in [m.value for m in Mode]:
        raise ValueError(f"mode must be expert or learning, found {mode}")
    command = Command(
        id=_value(line, "id", str, f"line-{number}"),
        action=action,
        teacher=_value(line, "teacher", str, ""),
        mode=Mode(mode) if mode else None,
        until_step=_value(line, "until_step", int, 0),
        factor=float(_value(line, "factor", (int, float), 1.0)),
        asked_by=_value(line, "asked_by", str, ""),
    )
    first_step = _value(line, "first_step", int, 0)
    if first_step < 1:
        raise ValueError(f"first_step must be a step, 1 or more, found {line.get('first_step')}")
    return Stamped(command, first_step, float(_value(line, "at", (int, float), 0.0)))


def _value(line: dict[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = line.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {str: "a text", int: "a whole number"}.get(kind, "a number")
        raise TypeError(f"{key} must be {wanted}, found {json.dumps(value)}")
    return value
