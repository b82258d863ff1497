"""The file of the journal: its tables, its rows with their checksums, and what is found in it.

SQLite does not notice a flipped bit; every row has a checksum. A damaged decision ends what is
restored of its run; a damaged row of a run removes the run, whose ranks tell it again.

Not covered: who writes when (`journal.py`).
"""

from __future__ import annotations

import fcntl
import json
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from google.protobuf import json_format

from switokd.distillation.decision import Decision, Mode, PairDecision
from switokd.distillation.gap import Distances
from switokd.distillation.overrides import Stamped
from switokd.distillation.topology import Pair
from switokd.errors import UsageError
from switokd.services.coordinator.finished import prepare
from switokd.services.coordinator.journal_commands import (
    TABLES,
    Overridden,
    stored_commands,
    stored_overridden,
)
from switokd.services.coordinator.messages import plan_from_wire
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

APPLICATION_ID = 0x53774F4B
"""Marks the file as a journal, for `file` and for the check at the start."""
VERSION = 2
SCHEMA = """
CREATE TABLE runs (
  run TEXT PRIMARY KEY, epoch INTEGER NOT NULL, plan TEXT NOT NULL, settled INTEGER NOT NULL,
  ended INTEGER NOT NULL DEFAULT 0, failure TEXT NOT NULL DEFAULT '', crc INTEGER
);
CREATE TABLE decisions (
  run TEXT NOT NULL, step INTEGER NOT NULL, teacher TEXT NOT NULL, student TEXT NOT NULL,
  gap REAL NOT NULL, e_s REAL NOT NULL, e_t REAL NOT NULL, epsilon REAL NOT NULL,
  delta REAL NOT NULL, mode TEXT NOT NULL, n INTEGER NOT NULL, paused INTEGER NOT NULL,
  place INTEGER NOT NULL, pairs INTEGER NOT NULL, crc INTEGER NOT NULL,
  alone INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (run, step, place)
) WITHOUT ROWID;
"""
SECRETS = """
CREATE TABLE IF NOT EXISTS secrets (
  run TEXT PRIMARY KEY, digest BLOB NOT NULL, crc INTEGER NOT NULL
)"""
"""Digests of the runs' secrets. Older files lack the table; older coordinators ignore it."""
SQLITE = b"SQLite format 3\0"
"""How an SQLite file begins."""
RUN_ROW = "run, epoch, plan, settled, ended, failure"
IS_SOUND = f"crc = crc32({RUN_ROW})"
"""Holds for a row of `runs` that is not damaged. crc32 is `crc`, and no part of SQLite."""


@dataclass(frozen=True)
class StoredRun:
    """A run that had not ended when its coordinator did."""

    run_id: str
    epoch: int
    plan: Plan
    settled: int
    decisions: Sequence[Decision]
    """Those after the settled step, up to the first that is missing or damaged."""
    steps: Sequence[int]
    """Steps of this epoch that are written down, up to the last of `decisions`."""
    started: float = 0.0
    """When the run was first started, in seconds since 1970; 0: not known."""
    commands: Sequence[Stamped] = ()
    """All commands of the run, the oldest first."""


def row_of(run_id: str, decision: Decision, place: int, p: PairDecision) -> tuple[object, ...]:
    """Return the row of a pair, without its checksum."""
    d, pair = p.distances, p.pair
    return (
        *(run_id, decision.step, pair.teacher, pair.student, d.gap, d.e_s, d.e_t),
        *(p.epsilon, p.delta, p.mode.value, d.n, int(pair.teacher in decision.paused)),
        *(place, len(decision.pairs)),
    )


def crc(row: Sequence[object]) -> int:
    """Return the checksum of a row."""
    return zlib.crc32(repr(tuple(row)).encode())


def lock_journal(path: Path) -> IO[str]:
    """Keep a second coordinator from writing the same journal.

    UsageError if the path cannot be a journal; then no lock file is left.
    """
    if problem := _problem_of(path):
        raise UsageError(f"--journal {path}: {problem}")
    try:
        lock = path.with_name(f"{path.name}.lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--journal {path}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UsageError(f"--journal {path}: another coordinator writes it") from None
    return lock


def _problem_of(path: Path) -> str:
    """Say why a path cannot be a journal, as far as a look at it tells."""
    if path.is_dir():
        return f"this is a folder; name a file, such as {path / 'journal.sqlite'}"
    if not path.parent.is_dir():
        if path.parent.exists():
            return f"{path.parent} is a file; name a file in a folder"
        return f"there is no folder {path.parent}; make it, or name another"
    if path.is_file() and path.stat().st_size and is_sqlite(path) is False:
        return (
            "this file is not a database; name another, or move it away to start a new one: "
            "the runs go on all the same"
        )
    return ""


def is_sqlite(path: Path) -> bool | None:
    """Return whether a file is an SQLite database; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return None


def connect(path: Path) -> sqlite3.Connection:
    """Open a journal for writing."""
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_mode = TRUNCATE")  # its end is synced, unlike a deletion
    connection.create_function("crc32", -1, lambda *row: crc(row), deterministic=True)
    return connection


def open_journal(path: Path) -> list[StoredRun]:
    """Create or check the file, and return its runs that have not ended.

    UsageError if the file is no journal, and then unchanged; sqlite3.Error if it is damaged.
    """
    is_new = _is_new(path)
    with closing(connect(path)) as connection, connection:
        if is_new:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only possible before a table
        connection.execute("BEGIN IMMEDIATE")
        if is_new:
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        for table in TABLES:
            connection.execute(table)
        connection.execute(SECRETS)
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"the file is damaged ({verdict.splitlines()[-1]})")
        prepare(connection, time.time())
        rows = connection.execute(f"SELECT {RUN_ROW}, crc FROM runs WHERE ended = 0").fetchall()
        started = dict(connection.execute("SELECT run, started FROM summaries"))
        found = [run for row in rows if (run := _stored(connection, *row))]
        return [replace(run, started=started[run.run_id]) for run in found]


def read_secrets(path: Path) -> dict[str, bytes]:
    """Return the digests of the runs' secrets; those that are damaged are left out.

    The first rank of such a run that joins sets its secret again.
    """
    with closing(connect(path)) as connection:
        rows = connection.execute("SELECT run, digest, crc FROM secrets").fetchall()
    damaged = [run for run, digest, noted in rows if crc((run, digest)) != noted]
    for run in damaged:
        log.warning("journal: the secret of run %s is damaged: its next rank sets it again", run)
    return {run: digest for run, digest, _ in rows if run not in damaged}


def _is_new(path: Path) -> bool:
    """Return whether the file has no table yet; UsageError if it is not a journal."""
    with closing(sqlite3.connect(path, timeout=5.0)) as connection:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and not application:
        return True
    if application != APPLICATION_ID:
        raise UsageError(f"--journal {path} is a database, but not a journal of switokd")
    if version != VERSION:
        raise UsageError(
            f"--journal {path} has version {version}, this coordinator needs {VERSION}"
        )
    return False


def _stored(connection: sqlite3.Connection, *row: Any) -> StoredRun | None:
    """Return a run with its decisions; None if its row is damaged, which removes it."""
    (run_id, epoch, text, settled, *_), noted = row[:-1], row[-1]
    if crc(row[:-1]) != noted:
        log.warning("journal: run %s is damaged and left out: its ranks tell it again", run_id)
        connection.execute("DELETE FROM runs WHERE run = ?", (run_id,))
        return None
    try:
        plan = plan_from_wire(json_format.ParseDict(json.loads(text), pb.RunPlan()))
    except (ValueError, json_format.ParseError, Refusal):
        log.exception("journal: run %s has a plan that cannot be read", run_id)
        return None
    rows = connection.execute(
        "SELECT * FROM decisions WHERE run = ? AND step >= ? ORDER BY step, place",
        (run_id, plan.first_step),
    )
    overridden = stored_overridden(connection, run_id, plan.first_step)
    found = {decision.step: decision for decision in whole_decisions(rows, overridden)}
    decisions, step = [], settled + 1
    while step in found:
        decisions.append(found[step])
        step += 1
    if found and step <= max(found):
        log.warning("journal: run %s goes on before step %d, which is damaged", run_id, step)
    steps = [s for s in found if s < step]
    commands = stored_commands(connection, run_id)
    return StoredRun(run_id, epoch, plan, settled, decisions, steps, commands=commands)


def whole_decisions(rows: Iterable[Sequence[Any]], overridden: Overridden) -> Iterable[Decision]:
    """Yield the decisions none of whose rows is missing or damaged.

    overridden: what commands have changed.
    """
    for step, of_step in groupby(rows, key=lambda row: row[1]):
        pairs: list[PairDecision] = []
        paused: dict[str, None] = {}
        count = 0
        for *row, noted, _alone in of_step:
            if crc(row) != noted:
                break
            teacher, student, gap, e_s, e_t, epsilon, delta, mode, n, is_paused, place, count = row[
                2:
            ]
            changed = overridden.get((step, place), (False, 1.0))
            if changed is None:
                break
            pair, distances = Pair(teacher, student), Distances(gap, e_s, e_t, n)
            pairs.append(PairDecision(pair, distances, epsilon, delta, Mode(mode), *changed))
            if is_paused:
                paused[teacher] = None
        if pairs and len(pairs) == count:
            yield Decision(step, tuple(pairs), tuple(paused))
