"""What a process says: as text for a person, or as one JSON object a line for a log collector.

    {"time": "2026-01-31T12:00:00.000+00:00", "level": "warning", "run": "digits-2t1s-1a2b3c",
     "rank": 1, "step": 420, "message": "waiting for ..."}

`run` is the run's name until the run has joined, then its id. `rank` and `step` are null where
there is none, as in the process that starts the ranks. An error that nobody has caught has a
`traceback` as well. Imported without torch.

Not covered: what a C library writes to standard error by itself. `switokd train` makes objects of
the lines of its ranks (`launcher.py`); torchrun writes its own messages as they are.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, Literal, TextIO

from switokd.runtime.phase import ACTIVITY

LOG_FORMAT = "SWITOKD_LOG_FORMAT"
"""Environment variable: json for objects. --log-format sets it, for this process and those that it
starts."""

QUIET = "SWITOKD_QUIET"
"""Environment variable that --quiet sets in the same way."""

MOST_CHARACTERS = 4000
"""Longest message of Python's logging."""

Level = Literal["info", "warning", "error"]


@dataclass
class _Identity:
    """Who speaks in this process."""

    run: str | None = None
    rank: int | None = None


_identity = _Identity()


def identify(run: str | None = None, rank: int | None = None) -> None:
    """Note the run or the rank of this process, for its objects; None leaves it as it is."""
    _identity.run = run or _identity.run
    _identity.rank = _identity.rank if rank is None else rank


def is_json() -> bool:
    """Whether messages are JSON objects."""
    return os.environ.get(LOG_FORMAT) == "json"


def is_quiet() -> bool:
    """Whether only warnings and errors are wanted."""
    return bool(os.environ.get(QUIET))


def plain_environment() -> dict[str, str]:
    """Return the environment for a process whose messages are read as text by this one."""
    return {k: v for k, v in os.environ.items() if k not in (LOG_FORMAT, QUIET)}


def as_json(message: str, level: Level, **more: object) -> str:
    """Return the JSON object of a message, without a line end."""
    step = ACTIVITY.now().step
    return json.dumps(
        {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "level": level,
            "run": _identity.run,
            "rank": _identity.rank,
            "step": step or None,
            "message": message,
            **more,
        },
        ensure_ascii=False,
    )


def say(sentence: str, level: Level, who: str = "") -> None:
    """Write a message to standard error, each of its lines by itself.

    who: names the rank in the text; in an object, the rank is a value.
    """
    if level == "info" and is_quiet():
        return
    prefix = "" if is_json() and _identity.rank is not None else who and f"{who}: "
    lines = [f"{prefix}{line}" for line in sentence.splitlines()]
    if is_json():
        text = "".join(f"{as_json(line, level)}\n" for line in lines)
    else:
        text = "".join(f"switokd: {line}\n" for line in lines)
    # Ranks share the terminal. One write keeps the lines whole; print() writes its end separately.
    sys.stderr.write(text)
    sys.stderr.flush()


class JsonLines:
    """A text stream that makes an object of every line that is written to it."""

    def __init__(self, stream: TextIO, level: Level) -> None:
        self._stream = stream
        self._level, self._rest, self._lock = level, "", threading.Lock()

    def write(self, text: str) -> int:
        """Write the lines that are complete; a line that is no text is left out."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            said = "".join(f"{line}\n" for line in objects(lines, self._level))
        if said:
            self._stream.write(said)
        return len(text)

    def isatty(self) -> bool:
        """Return False: nothing may draw over what is written."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def objects(lines: Iterable[str], level: Level) -> list[str]:
    """Return lines as JSON objects; those that are objects already stay, and empty ones go."""
    return [
        line if line.startswith('{"time": ') else as_json(line.rstrip(), level)
        for line in lines
        if line.strip()
    ]


class _Objects(logging.Formatter):
    """Makes an object of a record; levels below and above ours become the nearest one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        warns = record.levelno >= logging.WARNING
        fails = record.levelno >= logging.ERROR
        level: Level = "error" if fails else "warning" if warns else "info"
        return as_json(super().format(record)[:MOST_CHARACTERS], level)


def format_records() -> None:
    """Let Python's logging write objects, if these are wanted; call it when logging is set up."""
    for handler in logging.getLogger().handlers if is_json() else ():
        handler.setFormatter(_Objects())


def _tell_uncaught(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    frames = "".join(traceback.format_exception(kind, error, where))
    message = "".join(traceback.format_exception_only(kind, error)).strip()
    sys.stderr.write(f"{as_json(message, 'error', traceback=frames)}\n")


def set_up(arguments: Sequence[str] = ()) -> None:
    """Obey the environment variables, and --log-format of a command line that is not yet parsed.

    A mistake in the command line is then told in the format that is wanted.
    """
    if "--log-format=json" in "=".join(arguments):
        os.environ[LOG_FORMAT] = "json"
    if is_quiet():
        logging.disable(logging.INFO)
    if not is_json() or isinstance(sys.stderr, JsonLines):
        return
    sys.stderr = JsonLines(sys.stderr, "warning")
    sys.excepthook = _tell_uncaught
    logging.basicConfig(level=logging.INFO)
    format_records()


def log_output() -> None:
    """Treat standard output as messages too: objects if these are wanted, nothing with --quiet.

    For commands whose output reports what they do, and not for those whose output is their result.
    """
    if is_quiet():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 until the process ends
    elif is_json() and not isinstance(sys.stdout, JsonLines):
        sys.stdout = JsonLines(sys.stdout, "info")
