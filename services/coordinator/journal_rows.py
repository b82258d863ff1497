"""Rows of the journal that cannot be written, and the room that is left for those that can.

Not covered: the transactions (`journal.py`); the tables (`journal_file.py`).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from switokd.services.coordinator.finished import numbered

Statement = tuple[str, Sequence[object]]
ADD = "INSERT OR REPLACE INTO decisions"


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of a file's file system for this user; None: not known."""
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def problem_of(connection: sqlite3.Connection, sql: str, values: Sequence[object]) -> str:
    """Run a statement; say why if its values can never be written, else return an empty text.

    Such values come from a faulty or hostile rank, and must not hold up the other runs.
    """
    try:
        connection.execute(sql, numbered(values) if "?1" in sql else values)
    except (sqlite3.IntegrityError, OverflowError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def without(statements: Sequence[Statement], left_out: Sequence[Statement]) -> list[Statement]:
    """Return the statements that were written, without rows of a step that was written in part."""
    missing = {id(statement) for statement in left_out}
    steps = {values[:2] for sql, values in left_out if sql.startswith(ADD)}
    return [
        (sql, values)
        for sql, values in (s for s in statements if id(s) not in missing)
        if not (sql.startswith(ADD) and values[:2] in steps)
    ]
