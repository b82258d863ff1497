"""Reads a journal without changing it, also while a coordinator writes it.

A write that was cut off, because the coordinator was killed, is taken back in a copy of the file.
A reader that stays in a transaction would keep the coordinator from writing. Rows are therefore
read in short batches.

Not covered: what a coordinator restores from its journal (`journal_file.py`).
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format

from switokd.distillation.overrides import Stamped
from switokd.errors import UsageError, nearest
from switokd.services.coordinator.journal_commands import (
    Overridden,
    stored_commands,
    stored_overridden,
)
from switokd.services.coordinator.journal_file import APPLICATION_ID, VERSION, crc
from switokd.services.coordinator.messages import plan_from_wire
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.v1 import coordinator_pb2 as pb

BATCH = 5_000
"""Rows that are read at once, in some milliseconds."""
T = TypeVar("T")


@dataclass(frozen=True)
class JournalledRun:
    """A run of a journal. begin, end: its first and last recorded step; None: there is none."""

    run_id: str
    epoch: int
    plan: Plan
    has_ended: bool
    begin: int | None
    end: int | None


class JournalReader:
    """Reads the runs of a journal; UsageError, of one line, if the file is none or is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = self._source = path
        if path.is_dir():
            raise self._error("this is a folder; name the journal's file in it")
        if not path.is_file():
            raise self._error("there is no such file")
        application, version = self._ask(
            lambda c: [c.execute(f"PRAGMA {name}").fetchone()[0] for name in PRAGMAS]
        )
        if application != APPLICATION_ID:
            raise self._error("the file is no journal of switokd")
        if version != VERSION:
            raise self._error(f"the journal has version {version}, this command needs {VERSION}")

    def find(self, run_id: str) -> JournalledRun:
        """Return a run; UsageError, which names the nearest ids, if the journal has none."""
        row = self._ask(lambda c: c.execute(RUN, (run_id,)).fetchone())
        if row is None:
            ids = [name for (name,) in self._ask(lambda c: c.execute(IDS).fetchall())]
            known = f"the last of {len(ids)} are {', '.join(ids[-3:])}" if ids else "it has none"
            close = nearest(run_id, ids)
            raise self._error(f"there is no run {run_id!r}{close or f'; {known}'}")
        epoch, text, has_ended = row
        try:
            plan = plan_from_wire(json_format.ParseDict(json.loads(text), pb.RunPlan()))
            if problem := plan.topology.problem():
                raise ValueError(problem)
        except (ValueError, json_format.ParseError, Refusal):
            raise self._error(f"the plan of run {run_id} is damaged and cannot be read") from None
        begin, end = self._ask(lambda c: c.execute(SPAN, (run_id,)).fetchone())
        return JournalledRun(run_id, epoch, plan, bool(has_ended), begin, end)

    def rows(self, run: JournalledRun) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield a run's rows by column, by step and pair, each with the checksum it must have.

        UsageError if the run is started again meanwhile.
        """
        step, place = -1, -1
        while True:
            keys = (run.run_id, step, place, BATCH)
            columns, rows, changed = self._ask(lambda c, keys=keys: _fetch(c, keys))  # type: ignore[misc]
            if not rows:
                break
            sealed = columns.index("crc")
            for row in rows:
                found = dict(zip(columns, row, strict=True))
                override = changed.get((found["step"], found["place"]), (False, 1.0))
                if override is None:  # damaged, as the row is that it belongs to
                    yield found, ~crc(row[:sealed])
                    continue
                found["held"], found["delta_scale"] = override
                yield found, crc(row[:sealed])
            step, place = rows[-1][1], rows[-1][columns.index("place")]
        if self._ask(lambda c: c.execute(RUN, (run.run_id,)).fetchone())[0] != run.epoch:
            raise self._error(f"run {run.run_id} was started again meanwhile; repeat the command")

    def commands(self, run: JournalledRun) -> list[Stamped] | None:
        """Return the commands that a run's ranks have taken, in the order in which they did.

        None if the journal is older than commands.
        """

        def stored(connection: sqlite3.Connection) -> list[Stamped] | None:
            if not connection.execute(HAS_COMMANDS).fetchone():
                return None
            return stored_commands(connection, run.run_id)

        found = self._ask(stored)
        if found is None:
            return None
        return sorted((s for s in found if s.first_step > 0), key=lambda stamped: stamped.at)

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Ask the database on a connection of its own, which only reads."""
        try:
            try:
                return self._ask_file(self._source, question)
            except sqlite3.OperationalError:
                if not self._is_cut_off():
                    raise
            self._mend_copy()
            return self._ask_file(self._source, question)
        except (sqlite3.Error, OSError) as error:
            raise self._error(f"it cannot be read: {error}") from None

    def _ask_file(self, path: Path, question: Callable[[sqlite3.Connection], T]) -> T:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=10.0)) as connection:
            return question(connection)

    def _is_cut_off(self) -> bool:
        """Whether the coordinator was killed in the middle of a write."""
        rest = self._path.with_name(f"{self._path.name}-journal")
        return self._source == self._path and rest.is_file() and rest.stat().st_size > 0

    def _mend_copy(self) -> None:
        """Take back the last write in a copy: only who may write can take it back in the file."""
        folder = tempfile.mkdtemp(prefix="switokd-journal-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        copy = Path(folder) / "journal"
        for end in ("", "-journal"):
            shutil.copyfile(f"{self._path}{end}", f"{copy}{end}")
        with closing(sqlite3.connect(copy)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        self._source = copy

    def _error(self, problem: str) -> UsageError:
        return UsageError(f"--journal {self._path}: {problem}")


PRAGMAS = ("application_id", "user_version")
RUN = "SELECT epoch, plan, ended FROM runs WHERE run = ?"
IDS = "SELECT run FROM runs ORDER BY rowid"
SPAN = "SELECT min(step), max(step) FROM decisions WHERE run = ?"
HAS_COMMANDS = "SELECT 1 FROM sqlite_master WHERE name = 'commands'"
HAS_OVERRIDDEN = "SELECT 1 FROM sqlite_master WHERE name = 'overridden'"
ROWS = """SELECT * FROM decisions WHERE run = ? AND (step, place) > (?, ?)
  ORDER BY step, place LIMIT ?"""


def _fetch(
    connection: sqlite3.Connection, keys: tuple[object, ...]
) -> tuple[list[str], list[tuple[Any, ...]], Overridden]:
    """Return the names of the columns, the next rows, and what commands have changed in these."""
    cursor = connection.execute(ROWS, keys)
    columns, rows = [column[0] for column in cursor.description], cursor.fetchall()
    changed: Overridden = {}
    if rows and connection.execute(HAS_OVERRIDDEN).fetchone():
        changed = stored_overridden(connection, str(keys[0]), rows[0][1], rows[-1][1])
    return columns, rows, changed
