"""Finished runs in the journal: what is kept of them, and for how long.

A run's last status is one row of a table of its own, `summaries`. The table is added to a journal
that lacks it, and a coordinator that does not know it leaves it alone: the file's version stays.

Old runs are taken out in small transactions between the others, so that no decision waits for long.
Free pages go back to the file system, except in a journal that an earlier version has made: there
the next rows use them.

Not covered: runs that have not ended (`journal_file.py`).
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from switokd.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

DAY = 86400.0
STEPS_AT_ONCE = 500
"""Steps that one transaction takes out."""
PAGES_AT_ONCE = 2_000
"""Free pages that are given back after one transaction; a page has 4 KiB."""
BUSY_PAUSE, IDLE_PAUSE = 0.05, 30.0
"""Seconds between two transactions that take out rows, and between two looks for old runs."""

TABLE = """CREATE TABLE IF NOT EXISTS summaries (
  run TEXT PRIMARY KEY, started REAL NOT NULL, ended REAL NOT NULL DEFAULT 0, kept REAL NOT NULL,
  status BLOB
)"""
"""Times are seconds since 1970; 0: not known. `kept` is the time from which retention counts."""
ADOPT = "INSERT OR IGNORE INTO summaries (run, started, kept) SELECT run, 0, ? FROM runs"
ORPHANS = "DELETE FROM secrets WHERE run NOT IN (SELECT run FROM runs)"
"""Secrets of runs that earlier versions have taken out."""
BEGIN_SUMMARY = """INSERT INTO summaries (run, started, kept) VALUES (?1, ?2, ?3)
  ON CONFLICT (run) DO UPDATE SET ended = 0, status = NULL, kept = ?3"""
END_SUMMARY = """UPDATE summaries SET ended = ?1, kept = ?1, status = ?2
  WHERE run = ?3 AND EXISTS (SELECT 1 FROM runs WHERE runs.run = ?3 AND epoch = ?4)"""
FINISHED = """SELECT r.run, r.epoch, r.plan, r.settled, r.failure, s.started, s.ended, s.status
  FROM runs AS r JOIN summaries AS s ON s.run = r.run
  WHERE r.ended = 1 AND (?1 = '' OR r.run = ?1) ORDER BY s.kept DESC LIMIT ?2"""
OLDEST = """SELECT s.run FROM summaries AS s LEFT JOIN runs AS r ON r.run = s.run
  WHERE coalesce(r.ended, 1) = 1
    AND (s.kept < ?1 OR (SELECT count(*) FROM runs WHERE ended = 1) > ?2)
  ORDER BY s.kept LIMIT 1"""
TAKE_OUT_OVERRIDDEN = """DELETE FROM overridden
  WHERE run = ?1 AND step < ?2 + (SELECT min(step) FROM decisions WHERE run = ?1)"""
TAKE_OUT = """DELETE FROM decisions
  WHERE run = ?1 AND step < ?2 + (SELECT min(step) FROM decisions WHERE run = ?1)"""


@dataclass(frozen=True)
class Retention:
    """How long finished runs stay in the journal: this many days, and no more than so many runs."""

    days: float = 30.0
    runs: int = 1000


DEFAULT_RETENTION = Retention()
HISTORIES = """CREATE TABLE IF NOT EXISTS histories (
  run TEXT PRIMARY KEY, epoch INTEGER NOT NULL, history BLOB NOT NULL, crc INTEGER NOT NULL
)"""
"""What the status page shows of a run (`journal_history.py`)."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of the journal. status: as when it ended, as far as it is known."""

    run_id: str
    status: pb.GetRunStatusResponse

    def summary(self) -> pb.RunSummary:
        """Describe the run for ListRuns."""
        status = self.status
        return pb.RunSummary(
            run_id=self.run_id,
            state=status.state,
            networks=status.plan.networks,
            ranks=len({rank for network in status.plan.networks for rank in network.ranks}),
            last_step=max(status.last_decision.step, status.recorded_step),
            epoch=status.epoch,
            started_at=status.started_at,
            ended_at=status.ended_at,
            failure=status.failure,
        )


@dataclass(frozen=True)
class Query:
    """A question about finished runs, which the journal's thread answers."""

    run_id: str
    most: int
    answer: Future[list[FinishedRun]] = field(default_factory=Future)


def numbered(values: Sequence[object]) -> dict[str, object]:
    """Return values for the placeholders ?1, ?2, ... of a statement.

    A sequence would do before Python 3.14; since 3.12 it draws a warning.
    """
    return {str(number): value for number, value in enumerate(values, start=1)}


def prepare(connection: sqlite3.Connection, now: float) -> None:
    """Add what this version keeps to a journal. now: seconds since 1970."""
    connection.execute(TABLE)
    connection.execute(HISTORIES)
    connection.execute(ADOPT, (now,))
    connection.execute(ORPHANS)


def finished_runs(
    connection: sqlite3.Connection, run_id: str = "", most: int = 1
) -> list[FinishedRun]:
    """Return finished runs, those that ended last first; with a run_id, only this one."""
    rows = connection.execute(FINISHED, numbered((run_id, most))).fetchall()
    return [FinishedRun(row[0], _status(*row[1:])) for row in rows]


def _status(
    epoch: int, plan: str, settled: int, failure: str, started: float, ended: float, kept: Any
) -> pb.GetRunStatusResponse:
    """Return the status of a finished run; without `kept`, what its row says."""
    status = pb.GetRunStatusResponse()
    try:
        status.ParseFromString(kept or b"")
        status.plan.CopyFrom(json_format.ParseDict(json.loads(plan), pb.RunPlan()))
    except (DecodeError, ValueError, json_format.ParseError, TypeError):
        log.warning("journal: the summary of a finished run cannot be read")
    if failure:
        status.state = pb.RUN_STATE_FAILED
    elif status.state != pb.RUN_STATE_STOPPED:
        status.state = pb.RUN_STATE_FINISHED
    status.epoch, status.failure = epoch, failure
    status.started_at, status.ended_at = started, ended
    status.recorded_step = max(status.recorded_step, settled)
    return status


class Pruner:
    """Takes old runs out of a journal, a few rows at a time.

    on_taken_out: is told the id of each run that is gone.
    """

    def __init__(self, retention: Retention, on_taken_out: Callable[[str], object]) -> None:
        self._retention, self._on_taken_out = retention, on_taken_out
        self._due = time.monotonic() + BUSY_PAUSE

    @property
    def seconds_left(self) -> float:
        """Seconds until `run` has something to do."""
        return max(self._due - time.monotonic(), 0.0)

    def run(self, connection: sqlite3.Connection) -> None:
        """Take out some rows, if it is time to. Faults are logged: the next look tries again."""
        if self.seconds_left:
            return
        pause = IDLE_PAUSE
        try:
            if self._take_out(connection):
                pause = BUSY_PAUSE
        except sqlite3.Error as error:
            log.warning("journal: old runs cannot be taken out: %s; trying again", error)
        self._due = time.monotonic() + pause

    def _take_out(self, connection: sqlite3.Connection) -> bool:
        """Return whether there was anything to take out."""
        limits = (time.time() - DAY * self._retention.days, self._retention.runs)
        found = connection.execute(OLDEST, numbered(limits)).fetchone()
        if found is None:
            return False
        (run_id,) = found
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            values = numbered((run_id, STEPS_AT_ONCE))
            connection.execute(TAKE_OUT_OVERRIDDEN, values)
            taken = connection.execute(TAKE_OUT, values).rowcount
            if not taken:  # the run's own rows come last: an interrupted removal goes on
                tables = ("runs", "summaries", "commands", "overridden", "secrets", "histories")
                for table in tables:
                    connection.execute(f"DELETE FROM {table} WHERE run = ?", (run_id,))
        if not taken:
            self._on_taken_out(run_id)
            log.info("journal: run %s is taken out", run_id)
        # Python's `execute` would stop after the first page.
        connection.executescript(f"PRAGMA incremental_vacuum({PAGES_AT_ONCE})")
        return True


def summary_statements(
    run_id: str, epoch: int, status: pb.GetRunStatusResponse
) -> Iterable[tuple[str, tuple[object, ...]]]:
    """Return the statements that keep a run's last status; its plan has a row already."""
    kept = pb.GetRunStatusResponse()
    kept.CopyFrom(status)
    kept.ClearField("plan")
    return ((END_SUMMARY, (status.ended_at, kept.SerializeToString(), run_id, epoch)),)
