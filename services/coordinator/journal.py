"""The journal of decisions: an SQLite file that outlives the coordinator.

One thread writes, with one connection and in batches, so that no decision waits for the disk. A
decision counts as recorded once its transaction is on the disk (`synchronous=FULL`). SQLite keeps a
rollback journal, not a write-ahead log. Before SQLite 3.52 such a log may lose data where several
connections are open. A person who looks into the file with `sqlite3` is a second connection.

If the disk is full, the coordinator goes on and tries again; nothing counts as recorded meanwhile.

Not covered: the tables and what is found in them (`journal_file.py`); finished runs, and taking
them out (`finished.py`); copying the file.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from google.protobuf import json_format

from switokd.distillation.decision import Decision
from switokd.distillation.overrides import Stamped
from switokd.errors import UsageError
from switokd.services.coordinator.finished import (
    BEGIN_SUMMARY,
    DEFAULT_RETENTION,
    FinishedRun,
    Pruner,
    Query,
    Retention,
    finished_runs,
    summary_statements,
)
from switokd.services.coordinator.journal_commands import (
    CUT_OVERRIDDEN,
    command_statement,
    overridden_statements,
)
from switokd.services.coordinator.journal_file import (
    IS_SOUND,
    RUN_ROW,
    StoredRun,
    connect,
    crc,
    lock_journal,
    open_journal,
    read_secrets,
    row_of,
)
from switokd.services.coordinator.journal_rows import (
    ADD,
    Statement,
    free_bytes,
    problem_of,
    without,
)
from switokd.services.coordinator.messages import plan_to_wire
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.steps import StepSet
from switokd.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

BEGIN = "INSERT INTO runs (run, epoch, plan, settled) VALUES (?, ?, ?, ?)"
BEGIN += f""" ON CONFLICT (run) DO UPDATE SET settled = iif(
    epoch = excluded.epoch AND {IS_SOUND}, max(settled, excluded.settled), excluded.settled),
  epoch = excluded.epoch, plan = excluded.plan, ended = 0, failure = ''"""
SEAL = f"UPDATE runs SET crc = crc32({RUN_ROW}) WHERE run = ?"
"""Writes the checksum of a row that BEGIN has written as a whole."""
SETTLE = f"""UPDATE runs SET settled = ?1, crc = crc32(run, epoch, plan, ?1, ended, failure)
  WHERE run = ?2 AND epoch = ?3 AND {IS_SOUND}"""
END = f"""UPDATE runs SET ended = 1, failure = ?1, crc = crc32(run, epoch, plan, settled, 1, ?1)
  WHERE run = ?2 AND epoch = ?3 AND {IS_SOUND}"""
CUT = """DELETE FROM decisions WHERE run = ? AND step >= ?
  AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.run = decisions.run AND epoch = ?)"""
STEPS = """SELECT step FROM decisions WHERE run = ? AND step >= ?
  GROUP BY step HAVING count(*) = max(pairs) ORDER BY step"""
SECRET = "INSERT OR REPLACE INTO secrets VALUES (?, ?, ?)"
LOOK_SECONDS = 10.0
"""How often the free space is looked at, at least."""
RETRY_SECONDS = 1.0
"""Pause after a transaction that failed."""
MOST_WAITING = 200_000
"""Number of statements that wait for a full disk; further ones are given up."""

Statements = Callable[[], Sequence[Statement]]
"""Makes statements on the writing thread."""


class Journal:
    """Where a coordinator writes what must outlive it; no method waits.

    This one keeps nothing: ranks report again what their coordinator has forgotten.
    """

    path: Path | None = None
    """The file; None: there is none."""
    keeps = False
    """Whether anything is written down."""
    secrets: dict[str, bytes] = {}  # noqa: RUF012, never changed here
    """Digests of the runs' secrets, by run."""
    errors = 0
    """Transactions that failed, and rows that could not be written."""
    disk_free: int | None = None
    """Free bytes where the journal is; None: not known."""

    def begin(self, run_id: str, epoch: int, plan: Plan, started: float = 0.0) -> None:
        """Note a run, or its new epoch; decisions from the plan's first step on are removed.

        started: when the run was first started, in seconds since 1970.
        The decisions of this epoch stay: a coordinator before this one may have noted them, and
        have taken the run for lost.
        """

    def note_secret(self, run_id: str, digest: bytes) -> None:
        """Note the digest of a run's secret; it stays after the run's end."""

    def secret_digest(self, run_id: str) -> bytes:
        """Return the digest of a run's secret, also of a run that has ended; empty: none."""
        return self.secrets.get(run_id, b"")

    def add(self, run_id: str, decision: Decision, alone: bool = False) -> None:
        """Note a decision. alone: rank 0 has made it, without the coordinator."""

    def add_command(self, run_id: str, stamped: Stamped) -> None:
        """Note a command that waits for its run, or rank 0's answer."""

    def mark_alone(self, run_id: str, step: int) -> None:
        """Note that a rank has applied a step without waiting for its decision."""

    def settle(self, run_id: str, epoch: int, step: int) -> None:
        """Note that rank 0 has recorded all steps up to this one."""

    def end(self, run_id: str, epoch: int, failure: str) -> None:
        """Note that a run has ended; no effect if a later epoch has begun."""

    def keep(self, run_id: str, epoch: int, status: pb.GetRunStatusResponse) -> None:
        """Keep the last status of a run that has ended, for `finished`."""

    def run_later(self, make: Statements) -> None:
        """Write what may be lost: left out while the disk is full."""

    def forget(self, run_id: str) -> None:
        """Forget what `recorded` knows of an ended run; its rows stay."""

    def finished(self, run_id: str, most: int) -> Future[list[FinishedRun]]:
        """Return finished runs, those that ended last first; with a run_id, only this one."""
        answer: Future[list[FinishedRun]] = Future()
        answer.set_result([])
        return answer

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


Item = Sequence[Statement] | Statements | Query | str | None

NEVER_GIVEN_UP = (SECRET, CUT, CUT_OVERRIDDEN, BEGIN, SEAL)
"""Begun runs must stay. The ranks tell what is missing when they connect again."""


class SqliteJournal(Journal):
    """A journal in a file. UsageError if the file cannot be used.

    retention: how long finished runs stay in it.
    """

    keeps = True

    def __init__(self, path: Path, retention: Retention = DEFAULT_RETENTION) -> None:
        self._path = self.path = path
        self._queue: SimpleQueue[Item] = SimpleQueue()
        """Statements of one transaction; questions; ids of runs to forget; None: the end."""
        self._queries: list[Query] = []
        self._forgotten: set[str] = set()
        self._pruner = Pruner(retention, lambda run_id: self.secrets.pop(run_id, None))
        self._written: dict[str, StepSet] = {}
        """By run: its steps that are on the disk."""
        self._recorded: dict[str, tuple[int, int]] = {}
        """By run: the epoch that is on the disk, and its last step before a gap."""
        self._is_failing = self._has_left_out = False
        self._lock = lock_journal(path)
        try:
            self._stored, self.secrets = open_journal(path), read_secrets(path)
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

    def begin(self, run_id: str, epoch: int, plan: Plan, started: float = 0.0) -> None:
        """See `Journal`. The new epoch and the end of the old decisions are one transaction."""
        begin = partial(_begin, run_id, epoch, plan, started, time.time())
        self._queue.put(begin)  # made on the thread: a plan may be large

    def note_secret(self, run_id: str, digest: bytes) -> None:
        """See `Journal`."""
        self.secrets[run_id], row = digest, (run_id, digest)
        self._queue.put(((SECRET, (*row, crc(row))),))

    def add(self, run_id: str, decision: Decision, alone: bool = False) -> None:
        """See `Journal`."""
        rows = [row_of(run_id, decision, place, p) for place, p in enumerate(decision.pairs)]
        sql = f"{ADD} VALUES ({','.join('?' * (len(rows[0]) + 2))})" if rows else ""
        added = [(sql, (*row, crc(row), int(alone))) for row in rows]
        self._queue.put([*added, *overridden_statements(run_id, decision)])  # all or none

    def add_command(self, run_id: str, stamped: Stamped) -> None:
        """See `Journal`."""
        self._queue.put((command_statement(run_id, stamped),))

    def mark_alone(self, run_id: str, step: int) -> None:
        """See `Journal`."""
        sql = "UPDATE decisions SET alone = 1 WHERE run = ? AND step = ?"
        self._queue.put(((sql, (run_id, step)),))

    def settle(self, run_id: str, epoch: int, step: int) -> None:
        """See `Journal`."""
        self._queue.put(((SETTLE, (step, run_id, epoch)),))

    def end(self, run_id: str, epoch: int, failure: str) -> None:
        """See `Journal`."""
        self._queue.put(((END, (failure, run_id, epoch)),))

    def keep(self, run_id: str, epoch: int, status: pb.GetRunStatusResponse) -> None:
        """See `Journal`."""
        self._queue.put(tuple(summary_statements(run_id, epoch, status)))

    def run_later(self, make: Statements) -> None:
        """See `Journal`."""
        if not self._is_failing:
            self._queue.put(make)

    def forget(self, run_id: str) -> None:
        """See `Journal`."""
        self._queue.put(run_id)

    def finished(self, run_id: str, most: int) -> Future[list[FinishedRun]]:
        """See `Journal`."""
        query = Query(run_id, most)
        self._queue.put(query)
        return query.answer

    def close(self) -> None:
        """See `Journal`."""
        self._queue.put(None)
        self._thread.join(10.0)
        self._lock.close()

    def _write(self) -> None:
        waiting: list[Statement] = []
        is_closing = False
        with closing(connect(self._path)) as connection:
            while not is_closing:
                self.disk_free = free_bytes(self._path)
                is_closing = self._take(waiting)
                if waiting and self._commit(connection, waiting):
                    waiting = []
                elif len(waiting) > MOST_WAITING:
                    kept = [(sql, row) for sql, row in waiting if sql in NEVER_GIVEN_UP]
                    gone = len(waiting) - len(kept)
                    log.error("journal %s: %d rows are given up", self._path, gone)
                    self.errors += gone
                    waiting = kept
                for run_id in self._forgotten if not waiting else ():
                    self._written.pop(run_id, None)
                    self._recorded.pop(run_id, None)
                self._answer(connection)
                self._pruner.run(connection)

    def _take(self, waiting: list[Statement]) -> bool:
        """Append the statements that are queued; wait for one if none waits. True: the end."""
        with suppress(Empty):
            timeout = RETRY_SECONDS if waiting else min(self._pruner.seconds_left, LOOK_SECONDS)
            item = self._queue.get(timeout=timeout)
            while item is not None:
                if isinstance(item, Query):
                    self._queries.append(item)
                elif isinstance(item, str):
                    self._forgotten.add(item)
                else:
                    statements = item() if callable(item) else item
                    waiting.extend(statements)
                    self._forgotten -= {values[0] for sql, values in statements if sql is BEGIN}
                item = self._queue.get_nowait()
            return True
        return False

    def _answer(self, connection: sqlite3.Connection) -> None:
        """Answer the questions that have come; what was said before them is in the file."""
        queries, self._queries = self._queries, []
        for query in queries:
            if query.answer.set_running_or_notify_cancel():
                try:
                    query.answer.set_result(finished_runs(connection, query.run_id, query.most))
                except Exception as error:
                    query.answer.set_exception(error)

    def _commit(self, connection: sqlite3.Connection, statements: Sequence[Statement]) -> bool:
        """Run the statements in one transaction; return whether they are on the disk."""
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                refused = [(s, why) for s in statements if (why := problem_of(connection, *s))]
            if refused:
                self.errors += len(refused)
                if not self._has_left_out:
                    log.error("journal %s: a row is left out: %s", self._path, refused[0][1])
                self._has_left_out = True
                statements = without(statements, [statement for statement, _ in refused])
            begun = {
                values[0]: [step for (step,) in connection.execute(STEPS, (values[0], 0))]
                for sql, values in statements
                if sql is BEGIN
            }
        except sqlite3.Error as error:
            if not self._is_failing:
                log.error("journal %s cannot be written: %s; trying again", self._path, error)
            self._is_failing = True
            self.errors += 1
            return False
        if self._is_failing:
            log.warning("journal %s is written again", self._path)
        self._is_failing = False
        for sql, values in statements:
            if sql is BEGIN:
                run_id, epoch, _, settled = values
                first = int(str(settled)) + 1
                steps = [step for step in begun[run_id] if step >= first]
                self._note(str(run_id), int(str(epoch)), first, steps)
            elif sql.startswith(ADD):
                run_id, step, *_ = values
                if known := self._written.get(str(run_id)):  # not one forgotten, or left out
                    known.add(int(str(step)))
        for name, written in self._written.items():
            self._recorded[name] = self._recorded[name][0], written.last_before_gap
        return True

    def _note(self, run_id: str, epoch: int, first_step: int, steps: Iterable[int]) -> None:
        """Note the steps of a run that are on the disk."""
        written = self._written[run_id] = StepSet()
        for step in (first_step - 1, *steps):
            written.add(step)
        self._recorded[run_id] = epoch, written.last_before_gap


def _begin(run_id: str, epoch: int, plan: Plan, started: float, now: float) -> Sequence[Statement]:
    """Return the statements that note a run, or its new epoch."""
    text = json.dumps(json_format.MessageToDict(plan_to_wire(plan)))
    values = (run_id, epoch, text, plan.first_step - 1)
    from_here = (run_id, plan.first_step, epoch)
    cut: Sequence[Statement] = ((CUT, from_here), (CUT_OVERRIDDEN, from_here))
    return *cut, (BEGIN, values), (SEAL, (run_id,)), (BEGIN_SUMMARY, (run_id, started, now))
