"""Finished runs in a real journal: old files, retention, the size of the file.

Not covered: what a coordinator tells of them (`test_views.py`).
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from switokd.services.coordinator import finished
from switokd.services.coordinator.finished import FinishedRun, Retention
from switokd.services.coordinator.journal import NO_JOURNAL, SqliteJournal
from switokd.v1 import coordinator_pb2 as pb
from tests.services.examples import PLAN
from tests.services.test_journal import decision, opened, write
from tests.support import wait_until


def end(path: Path, run_id: str, steps: int = 20) -> None:
    """A run with some steps that has ended."""
    with opened(path) as journal:
        journal.begin(run_id, 1, PLAN, 100.0)
        for step in range(1, steps + 1):
            journal.add(run_id, decision(step))
        journal.end(run_id, 1, "")
        status = pb.GetRunStatusResponse(state=pb.RUN_STATE_FINISHED, ended_at=time.time())
        journal.keep(run_id, 1, status)


def read(path: Path, run_id: str = "", most: int = 10) -> list[FinishedRun]:
    with opened(path) as journal:
        return journal.finished(run_id, most).result(10)


def counts(path: Path, table: str) -> dict[str, int]:
    """Rows by run."""
    with closing(sqlite3.connect(path, timeout=5.0)) as connection:
        return dict(connection.execute(f"SELECT run, count(*) FROM {table} GROUP BY 1"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for old runs at once and again and again."""
    monkeypatch.setattr(finished, "BUSY_PAUSE", 0.001)
    monkeypatch.setattr(finished, "IDLE_PAUSE", 0.02)


def test_a_run_is_found_by_its_id_and_the_last_ones_first(tmp_path: Path) -> None:
    for run_id in ("first", "second", "third"):
        end(tmp_path / "j", run_id)
    assert [run.run_id for run in read(tmp_path / "j", most=2)] == ["third", "second"]
    (run,) = read(tmp_path / "j", "second")
    assert (run.run_id, run.status.started_at, run.status.epoch) == ("second", 100.0, 1)
    assert run.summary().ranks == 3
    assert read(tmp_path / "j", "nobody") == []
    assert NO_JOURNAL.finished("", 1).result(0) == []


def test_a_run_that_goes_on_is_no_finished_one(tmp_path: Path) -> None:
    end(tmp_path / "j", "r")
    with opened(tmp_path / "j") as journal:
        journal.begin("r", 2, PLAN, 200.0)
        assert journal.finished("r", 1).result(10) == []
        journal.keep("r", 1, pb.GetRunStatusResponse(ended_at=5.0))  # of an earlier start
        journal.end("r", 2, "rank 1 (b) went away")
        (run,) = journal.finished("r", 1).result(10)
    assert (run.status.state, run.status.epoch) == (pb.RUN_STATE_FAILED, 2)
    assert (run.status.started_at, run.status.ended_at) == (100.0, 0.0)
    assert run.status.failure == "rank 1 (b) went away"


def test_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    with opened(tmp_path / "j") as journal:
        journal.begin("r", 1, PLAN, 100.0)
        journal.end("r", 1, "")
        status = pb.GetRunStatusResponse(state=pb.RUN_STATE_STOPPED, ended_at=time.time())
        journal.keep("r", 1, status)  # one that ended in 1970 would be taken out
    (run,) = read(tmp_path / "j")
    assert run.status.state == run.summary().state == pb.RUN_STATE_STOPPED


def test_a_journal_of_an_earlier_version_opens_and_its_runs_stay(
    tmp_path: Path, quick: None
) -> None:
    end(tmp_path / "j", "old")
    write(tmp_path / "j", range(1, 4))
    with closing(sqlite3.connect(tmp_path / "j")) as connection, connection:
        connection.execute("DROP TABLE summaries")
    with opened(tmp_path / "j") as journal:
        assert [run.run_id for run in journal.stored()] == ["r"]
        (run,) = journal.finished("", 5).result(10)
    assert (run.run_id, run.status.state) == ("old", pb.RUN_STATE_FINISHED)
    assert (run.status.started_at, run.status.ended_at) == (0.0, 0.0)
    assert run.summary().ranks == 3


def test_only_the_newest_finished_runs_stay(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "j"
    for run_id in ("a", "b", "c", "d"):
        end(path, run_id, steps=700 if run_id == "b" else 20)
    write(path, range(1, 6))
    with opened(path) as before:
        for run_id in ("a", "b", "c", "d"):
            before.note_secret(run_id, b"digest")
    with closing(SqliteJournal(path, Retention(runs=2))) as journal:
        wait_until(lambda: counts(path, "runs").keys() == {"c", "d", "r"}, 20, "two are gone")
        wait_until(lambda: "a" not in journal.secrets, 20, "its secret is forgotten")
        assert journal.secret_digest("d")
    assert counts(path, "secrets") == {"c": 1, "d": 1}
    assert counts(path, "decisions") == {"c": 40, "d": 40, "r": 10}
    assert counts(path, "summaries").keys() == {"c", "d", "r"}


def test_secrets_of_runs_that_an_earlier_version_took_out_go(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 3))
    with opened(tmp_path / "j") as journal:
        journal.note_secret("r", b"digest")
        journal.note_secret("gone", b"digest")
    with opened(tmp_path / "j") as journal:
        assert journal.secrets.keys() == {"r"}


def test_runs_that_ended_long_ago_go_and_the_file_shrinks(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "j"
    end(path, "old", steps=3000)
    end(path, "new", steps=20)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE summaries SET kept = kept - 3 * 86400 WHERE run = 'old'")
    before = path.stat().st_size
    with closing(SqliteJournal(path, Retention(days=2.0))):
        wait_until(lambda: counts(path, "runs").keys() == {"new"}, 20, "the old run is gone")
        wait_until(lambda: path.stat().st_size < before / 5, 20, "the file has shrunk")
    assert counts(path, "decisions") == {"new": 40}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_journal_of_many_runs_does_not_grow(tmp_path: Path, quick: None) -> None:
    path, sizes = tmp_path / "j", []
    with closing(SqliteJournal(path, Retention(runs=1))) as journal:
        for number in range(8):
            run_id = f"run{number}"
            journal.begin(run_id, 1, PLAN, 1.0)
            for step in range(1, 301):
                journal.add(run_id, decision(step))
            journal.end(run_id, 1, "")
            journal.keep(run_id, 1, pb.GetRunStatusResponse(ended_at=time.time()))
            journal.forget(run_id)
            alone = {run_id}
            wait_until(lambda: counts(path, "runs").keys() == alone, 20, "one run")  # noqa: B023
            whole = {run_id: 600}
            wait_until(lambda: counts(path, "decisions") == whole, 20, "its rows")  # noqa: B023
            sizes.append(path.stat().st_size)
        assert journal.recorded(run_id, 1) in (0, 300)
    # The first one may be measured before its history is written.
    assert max(sizes) < 1.5 * sizes[1]


def test_a_forgotten_run_can_be_begun_again(tmp_path: Path) -> None:
    with opened(tmp_path / "j") as journal:
        journal.begin("r", 1, PLAN)
        journal.add("r", decision(1))
        wait_until(lambda: journal.recorded("r", 1) == 1, 10, "a step")
        journal.end("r", 1, "lost")
        journal.forget("r")
        wait_until(lambda: journal.recorded("r", 1) == 0, 10, "it is forgotten")
        journal.add("r", decision(2))  # that of a stream that ends late
        journal.begin("r", 1, PLAN)
        wait_until(lambda: journal.recorded("r", 1) == 2, 10, "both steps")
