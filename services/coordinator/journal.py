"""The journal of decisions: an SQLite file that outlives the coordinator.

One thread writes, with one connection and in batches, so that no decision waits for the disk. A
decision counts as recorded once its transaction is on the disk (`synchronous=FULL`). The rollback
journal is used, not the write-ahead log: before SQLite 3.52 the latter may lose data where several
connections are open, and a person who looks into the file with `sqlite3` is a second connection.

If the disk is full, the coordinator goes on and tries again; nothing counts as recorded meanwhile.

Not covered: copying or shrinking the file, taking out runs.
"""

from __future__ import annotations

import fcntl
import json
import logging
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from google.protobuf import json_format

from switokd.distillation.decision import Decision, Mode, PairDecision
from switokd.distillation.gap import Distances
from switokd.distillation.topology import Pair
from switokd.errors import UsageError
from switokd.services.coordinator.messages import plan_from_wire, plan_to_wire
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.steps import StepSet
from switokd.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

APPLICATION_ID = 0x53774F4B
"""Marks the file as a journal, for `file` and for the check at the start."""
VERSION = 1
SCHEMA = """
CREATE TABLE runs (
  run TEXT PRIMARY KEY, epoch INTEGER NOT NULL, plan TEXT NOT NULL, settled INTEGER NOT NULL,
  ended INTEGER NOT NULL DEFAULT 0, failure TEXT NOT NULL DEFAULT ''
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
BEGIN = "INSERT INTO runs (run, epoch, plan, settled) VALUES (?, ?, ?, ?)"
BEGIN += """ ON CONFLICT (run) DO UPDATE SET
  settled = iif(epoch = excluded.epoch, max(settled, excluded.settled), excluded.settled),
  epoch = excluded.epoch, plan = excluded.plan, ended = 0, failure = ''"""
CUT = """DELETE FROM decisions WHERE run = ? AND step >= ?
  AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.run = decisions.run AND epoch = ?)"""
STEPS = """SELECT step FROM decisions WHERE run = ? AND step >= ?
  GROUP BY step HAVING count(*) = max(pairs) ORDER BY step"""
ADD = "INSERT OR REPLACE INTO decisions"
RETRY_SECONDS = 1.0
"""Pause after a transaction that failed."""
MOST_WAITING = 200_000
"""Number of statements that wait for a full disk; further ones are given up."""

Statement = tuple[str, Sequence[object]]


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


class Journal:
    """Where a coordinator writes what must outlive it; no method waits.

    This one keeps nothing: ranks report again what their coordinator has forgotten.
    """

    keeps = False
    """Whether anything is written down."""

    def begin(self, run_id: str, epoch: int, plan: Plan) -> None:
        """Note a run, or its new epoch; decisions from the plan's first step on are removed.

        The decisions of this epoch stay: a coordinator before this one may have noted them, and
        have taken the run for lost.
        """

    def add(self, run_id: str, decision: Decision, alone: bool = False) -> None:
        """Note a decision. alone: rank 0 has made it, without the coordinator."""

    def mark_alone(self, run_id: str, step: int) -> None:
        """Note that a rank has applied a step without waiting for its decision."""

    def settle(self, run_id: str, epoch: int, step: int) -> None:
        """Note that rank 0 has recorded all steps up to this one."""

    def end(self, run_id: str, epoch: int, failure: str) -> None:
        """Note that a run has ended; no effect if a later epoch has begun."""

    def recorded(self, run_id: str, epoch: int) -> int:
        """Return the last step of a run that is on the disk with all before it; 0: none.

        epoch: that of the run. Steps of an earlier one do not count.
        """
        return 0

    def stored(self) -> Iterable[StoredRun]:
        """Return the runs that had not ended when the journal was opened."""
        return ()

    def close(self) -> None:
        """Write everything down."""


NO_JOURNAL = Journal()


class SqliteJournal(Journal):
    """A journal in a file. UsageError if the file cannot be used."""

    keeps = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: SimpleQueue[Sequence[Statement] | None] = SimpleQueue()
        self._written: dict[str, StepSet] = {}
        """By run: its steps that are on the disk."""
        self._recorded: dict[str, tuple[int, int]] = {}
        """By run: the epoch that is on the disk, and its last step before a gap."""
        self._is_failing = False
        self._lock = _lock(path)
        try:
            self._stored = _open(path)
        except sqlite3.Error as error:
            self._lock.close()
            raise UsageError(
                f"--journal {path}: {error}; move the file away to start a new one: the runs go on "
                "all the same"
            ) from None
        except UsageError:
            self._lock.close()
            raise
        for run in self._stored:
            self._note(run.run_id, run.epoch, run.plan.first_step, run.steps)
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def stored(self) -> Iterable[StoredRun]:
        """See `Journal`."""
        return self._stored

    def recorded(self, run_id: str, epoch: int) -> int:
        """See `Journal`."""
        written, step = self._recorded.get(run_id, (None, 0))
        return step if written == epoch else 0

    def begin(self, run_id: str, epoch: int, plan: Plan) -> None:
        """See `Journal`. The new epoch and the end of the old decisions are one transaction."""
        text = json.dumps(json_format.MessageToDict(plan_to_wire(plan)))
        values = (run_id, epoch, text, plan.first_step - 1)
        self._queue.put(((CUT, (run_id, plan.first_step, epoch)), (BEGIN, values)))

    def add(self, run_id: str, decision: Decision, alone: bool = False) -> None:
        """See `Journal`."""
        rows = [_row(run_id, decision, place, p) for place, p in enumerate(decision.pairs)]
        sql = f"{ADD} VALUES ({','.join('?' * (len(rows[0]) + 2))})" if rows else ""
        self._queue.put([(sql, (*row, _crc(row), int(alone))) for row in rows])  # all or none

    def mark_alone(self, run_id: str, step: int) -> None:
        """See `Journal`."""
        self._put("UPDATE decisions SET alone = 1 WHERE run = ? AND step = ?", run_id, step)

    def settle(self, run_id: str, epoch: int, step: int) -> None:
        """See `Journal`."""
        self._put("UPDATE runs SET settled = ? WHERE run = ? AND epoch = ?", step, run_id, epoch)

    def end(self, run_id: str, epoch: int, failure: str) -> None:
        """See `Journal`."""
        sql = "UPDATE runs SET ended = 1, failure = ? WHERE run = ? AND epoch = ?"
        self._put(sql, failure, run_id, epoch)

    def close(self) -> None:
        """See `Journal`."""
        self._queue.put(None)
        self._thread.join(10.0)
        self._lock.close()

    def _put(self, sql: str, *values: object) -> None:
        self._queue.put(((sql, values),))

    def _write(self) -> None:
        waiting: list[Statement] = []
        is_closing = False
        with closing(_connect(self._path)) as connection:
            while not is_closing:
                is_closing = self._take(waiting)
                if waiting and self._commit(connection, waiting):
                    waiting = []
                elif len(waiting) > MOST_WAITING:
                    # Begun runs must stay. The ranks tell what is missing when they connect again.
                    kept = [statement for statement in waiting if statement[0] in (CUT, BEGIN)]
                    log.error(
                        "journal %s: %d rows are given up", self._path, len(waiting) - len(kept)
                    )
                    waiting = kept

    def _take(self, waiting: list[Statement]) -> bool:
        """Append the statements that are queued; wait for one if none waits. True: the end."""
        with suppress(Empty):
            statements = self._queue.get(timeout=RETRY_SECONDS if waiting else None)
            while statements is not None:
                waiting.extend(statements)
                statements = self._queue.get_nowait()
            return True
        return False

    def _commit(self, connection: sqlite3.Connection, statements: Sequence[Statement]) -> bool:
        """Run the statements in one transaction; return whether they are on the disk."""
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                for sql, values in statements:
                    connection.execute(sql, values)
            begun = {
                values[0]: [step for (step,) in connection.execute(STEPS, (values[0], 0))]
                for sql, values in statements
                if sql is BEGIN
            }
        except sqlite3.Error as error:
            if not self._is_failing:
                log.error("journal %s cannot be written: %s; trying again", self._path, error)
            self._is_failing = True
            return False
        if self._is_failing:
            log.warning("journal %s is written again", self._path)
        self._is_failing = False
        for sql, values in statements:
            run_id, *rest = values
            if sql is BEGIN:
                epoch, _, settled = rest
                first = int(str(settled)) + 1
                steps = [step for step in begun[run_id] if step >= first]
                self._note(str(run_id), int(str(epoch)), first, steps)
            elif sql.startswith(ADD):
                self._written[str(run_id)].add(int(str(rest[0])))
        for name, written in self._written.items():
            self._recorded[name] = self._recorded[name][0], written.last_before_gap
        return True

    def _note(self, run_id: str, epoch: int, first_step: int, steps: Iterable[int]) -> None:
        """Note the steps of a run that are on the disk."""
        written = self._written[run_id] = StepSet()
        for step in (first_step - 1, *steps):
            written.add(step)
        self._recorded[run_id] = epoch, written.last_before_gap


def _row(run_id: str, decision: Decision, place: int, p: PairDecision) -> tuple[object, ...]:
    d, pair = p.distances, p.pair
    return (
        *(run_id, decision.step, pair.teacher, pair.student, d.gap, d.e_s, d.e_t),
        *(p.epsilon, p.delta, p.mode.value, d.n, int(pair.teacher in decision.paused)),
        *(place, len(decision.pairs)),
    )


def _crc(row: Sequence[object]) -> int:
    """Return the checksum of a row: SQLite would not notice a flipped bit."""
    return zlib.crc32(repr(tuple(row)).encode())


def _lock(path: Path) -> IO[str]:
    """Keep a second coordinator from writing the same journal."""
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


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_mode = TRUNCATE")  # its end is synced, unlike a deletion
    return connection


def _open(path: Path) -> list[StoredRun]:
    """Create or check the file, and return its runs that have not ended."""
    with closing(_connect(path)) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables and not application:
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        elif application != APPLICATION_ID:
            raise UsageError(f"--journal {path} is a database, but not a journal of switokd")
        elif version != VERSION:
            raise UsageError(
                f"--journal {path} has version {version}, this coordinator needs {VERSION}"
            )
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"the file is damaged ({verdict.splitlines()[-1]})")
        rows = connection.execute("SELECT run, epoch, plan, settled FROM runs WHERE ended = 0")
        return [_stored(connection, *row) for row in rows.fetchall()]


def _stored(
    connection: sqlite3.Connection, run_id: str, epoch: int, text: str, settled: int
) -> StoredRun:
    try:
        plan = plan_from_wire(json_format.ParseDict(json.loads(text), pb.RunPlan()))
    except (ValueError, json_format.ParseError, Refusal):
        raise sqlite3.DatabaseError(f"the plan of run {run_id!r} is damaged") from None
    rows = connection.execute(
        "SELECT * FROM decisions WHERE run = ? AND step >= ? ORDER BY step, place",
        (run_id, plan.first_step),
    )
    found = {decision.step: decision for decision in _whole_decisions(rows)}
    decisions, step = [], settled + 1
    while step in found:
        decisions.append(found[step])
        step += 1
    if found and step <= max(found):
        log.warning("journal: run %s goes on before step %d, which is damaged", run_id, step)
    steps = [s for s in found if s < step]
    return StoredRun(run_id, epoch, plan, settled, decisions, steps)


def _whole_decisions(rows: Iterable[Sequence[Any]]) -> Iterable[Decision]:
    """Yield the decisions none of whose rows is missing or damaged."""
    for step, of_step in groupby(rows, key=lambda row: row[1]):
        pairs: list[PairDecision] = []
        paused: dict[str, None] = {}
        count = 0
        for *row, crc, _alone in of_step:
            if _crc(row) != crc:
                break
            teacher, student, gap, e_s, e_t, epsilon, delta, mode, n, is_paused, _, count = row[2:]
            pair, distances = Pair(teacher, student), Distances(gap, e_s, e_t, n)
            pairs.append(PairDecision(pair, distances, epsilon, delta, Mode(mode)))
            if is_paused:
                paused[teacher] = None
        if pairs and len(pairs) == count:
            yield Decision(step, tuple(pairs), tuple(paused))
