"""The journal in a real SQLite file: acknowledged steps stay, damage is noticed, faults are said.

Not covered: a loss of power, which needs a machine to switch off.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from switokd.distillation.decision import Decision, Rule, decide
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair
from switokd.errors import UsageError
from switokd.services.coordinator.journal import SqliteJournal
from switokd.services.coordinator.journal_file import StoredRun
from tests.services.examples import EXPERT, LEARNING, PLAN
from tests.support import require, run, wait_until

RULE = Rule(make_strategy("switokd").switch)


def decision(step: int) -> Decision:
    gap = 0.1 + 0.001 * step  # 17 digits must survive
    b = replace(LEARNING.mean(), gap=gap)
    return decide(step, {Pair("a", "s"): EXPERT.mean(), Pair("b", "s"): b}, RULE)


@contextmanager
def opened(path: Path) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(path)
    try:
        yield journal
    finally:
        journal.close()


def write(path: Path, steps: range, epoch: int = 1, first_step: int = 1) -> None:
    with opened(path) as journal:
        journal.begin("r", epoch, replace(PLAN, first_step=first_step))
        for step in steps:
            journal.add("r", decision(step))
        last = steps[-1]
        wait_until(lambda: journal.recorded("r", epoch) == last, 10, "the last step on the disk")


def stored(path: Path) -> StoredRun:
    with opened(path) as journal:
        (found,) = journal.stored()
        return found


def test_decisions_come_back_with_every_bit(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 51))
    found = stored(tmp_path / "j")
    assert (found.run_id, found.epoch, found.plan, found.settled) == ("r", 1, PLAN, 0)
    assert list(found.decisions) == [decision(step) for step in range(1, 51)]


def test_a_new_start_of_the_job_takes_over_from_its_first_step(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 51))
    with opened(tmp_path / "j") as journal:
        assert journal.recorded("r", 1) == 50
        journal.begin("r", 2, replace(PLAN, first_step=31))
        assert journal.recorded("r", 2) in (0, 30)  # not what the first start had recorded
    write(tmp_path / "j", range(31, 33), epoch=2, first_step=31)
    found = stored(tmp_path / "j")
    assert [d.step for d in found.decisions] == [31, 32]
    with closing(sqlite3.connect(tmp_path / "j")) as connection:
        count, last = connection.execute("SELECT count(*), max(step) FROM decisions").fetchone()
    assert (count, last) == (64, 32)


def test_only_steps_without_a_gap_before_them_are_acknowledged(tmp_path: Path) -> None:
    with opened(tmp_path / "j") as journal:
        journal.begin("r", 1, PLAN)
        for step in (1, 2, 5):
            journal.add("r", decision(step))
        wait_until(lambda: journal.recorded("r", 1) == 2, 10, "two steps")
        for step in (3, 4):
            journal.add("r", decision(step), alone=True)
        wait_until(lambda: journal.recorded("r", 1) == 5, 10, "five steps")


def test_an_ended_run_does_not_come_back(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 3))
    with opened(tmp_path / "j") as journal:
        journal.end("r", 1, "rank 1 (b) went away")
    with opened(tmp_path / "j") as journal:
        assert not list(journal.stored())


def test_a_run_that_was_taken_for_lost_keeps_its_decisions(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 6))
    with opened(tmp_path / "j") as journal:
        journal.end("r", 1, "rank 1 (b) went away")
    with opened(tmp_path / "j") as journal:  # its ranks live, and join as before
        journal.begin("r", 1, PLAN)
        wait_until(lambda: journal.recorded("r", 1) == 5, 10, "the steps on the disk")
        journal.add("r", decision(6))
    with opened(tmp_path / "j") as journal:
        (run,) = journal.stored()
        assert list(run.steps) == list(range(1, 7))


def test_the_end_of_an_earlier_start_is_not_that_of_the_run(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 6))
    with opened(tmp_path / "j") as journal:
        journal.begin("r", 2, PLAN)
        journal.add("r", decision(1))
        journal.end("r", 1, "rank 1 (b) went away")
        journal.settle("r", 1, 5)
    with opened(tmp_path / "j") as journal:
        (run,) = journal.stored()
        assert (run.epoch, run.settled, list(run.steps)) == (2, 0, [1])


def test_the_databases_own_shell_reads_it_while_it_is_written(tmp_path: Path) -> None:
    shell = require("sqlite3", "sqlite3")
    with opened(tmp_path / "j") as journal:
        journal.begin("r", 1, PLAN)
        for step in range(1, 200):
            journal.add("r", decision(step))
            if step % 50 == 0:
                query = "SELECT count(*) FROM decisions WHERE mode = 'expert'"
                command = [shell, "-cmd", ".timeout 5000", str(tmp_path / "j"), query]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
        wait_until(lambda: journal.recorded("r", 1) == 199, 20, "all steps")
    check = subprocess.run(
        [shell, tmp_path / "j", "PRAGMA integrity_check"], capture_output=True, text=True
    )
    assert check.stdout == "ok\n"


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_never_comes_back_as_a_decision(seed: int, tmp_path: Path) -> None:
    path, rng = tmp_path / "j", random.Random(seed)
    write(path, range(1, 101))
    content = bytearray(path.read_bytes())
    for _ in range(3):
        content[rng.randrange(100, len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    runs: list[StoredRun] = []
    with suppress(UsageError), opened(path) as journal:  # SQLite has noticed it
        runs += journal.stored()
    for found in runs:
        assert (found.run_id, found.epoch, found.plan, found.settled) == ("r", 1, PLAN, 0)
        assert list(found.decisions) == [decision(d.step) for d in found.decisions]


CHANGES = {
    "epoch": "UPDATE runs SET epoch = 65",
    "settled": "UPDATE runs SET settled = 64",
    "plan": "UPDATE runs SET plan = plan || ' '",
}


@pytest.mark.parametrize("column", CHANGES)
def test_a_damaged_run_is_left_out_and_told_again(
    column: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "j", range(1, 6))
    with closing(sqlite3.connect(tmp_path / "j")) as connection, connection:
        connection.execute(CHANGES[column])
    with opened(tmp_path / "j") as journal:
        assert not list(journal.stored())
        assert "run r is damaged and left out" in caplog.text
        journal.begin("r", 1, PLAN)
        journal.add("r", decision(1))
        wait_until(lambda: journal.recorded("r", 1) >= 1, 10, "the step on the disk")
        journal.settle("r", 1, 1)
    found = stored(tmp_path / "j")
    assert (found.epoch, found.plan, found.settled) == (1, PLAN, 1)


def test_the_last_settled_step_and_the_end_are_sealed(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 6))
    with opened(tmp_path / "j") as journal:
        journal.settle("r", 1, 3)
    assert stored(tmp_path / "j").settled == 3
    with opened(tmp_path / "j") as journal:
        journal.end("r", 1, "rank 1 (b) went away")
    with closing(sqlite3.connect(tmp_path / "j")) as connection, connection:
        connection.execute("UPDATE runs SET ended = 0")
    with opened(tmp_path / "j") as journal:  # the row was changed by someone else
        assert not list(journal.stored())


def test_a_row_that_is_damaged_while_it_is_used_is_not_sealed_again(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 6))
    with opened(tmp_path / "j") as journal:
        with closing(sqlite3.connect(tmp_path / "j")) as connection, connection:
            connection.execute("UPDATE runs SET plan = plan || ' '")
        journal.settle("r", 1, 3)
    with opened(tmp_path / "j") as journal:
        assert not list(journal.stored())


def test_a_database_of_another_program_stays_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "j")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE other (x)")
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(UsageError, match="not a journal of switokd"):
        SqliteJournal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == before


def test_a_full_disk_is_said_once_and_nothing_is_acknowledged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "j", range(1, 3))
    original = SqliteJournal._commit
    pages = [10]

    def commit(self: SqliteJournal, connection: sqlite3.Connection, statements: object) -> bool:
        connection.execute(f"PRAGMA max_page_count = {pages[0]}")
        return original(self, connection, statements)  # type: ignore[arg-type]

    monkeypatch.setattr(SqliteJournal, "_commit", commit)
    with caplog.at_level(logging.WARNING), opened(tmp_path / "j") as journal:
        for step in range(3, 400):
            journal.add("r", decision(step))
        wait_until(lambda: "cannot be written" in caplog.text, 10, "a complaint")
        assert journal.recorded("r", 1) < 399
        assert journal.errors > 0
        assert journal.disk_free is not None
        pages[0] = 100_000
        wait_until(lambda: journal.recorded("r", 1) == 399, 20, "all steps")
    assert caplog.text.count("cannot be written: database or disk is full") == 1
    assert "is written again" in caplog.text


def poison(journal: SqliteJournal, kind: str) -> None:
    """Add what no database takes: a number beyond 64 bits, or one that SQLite takes for NULL."""
    journal.begin("x", 1, replace(PLAN, first_step=-(2**63)) if kind == "first step" else PLAN)
    if kind == "alone":
        journal.mark_alone("x", -(2**63) - 1)
    if kind == "not a number":
        whole = decision(2)
        wrong = replace(whole.pairs[1], epsilon=float("nan"))
        journal.add("x", decision(1))
        journal.add("x", replace(whole, pairs=(whole.pairs[0], wrong)))
    else:
        journal.add("x", decision(1))


@pytest.mark.parametrize("kind", ["first step", "alone", "not a number"])
def test_values_that_cannot_be_written_hold_up_no_other_run(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path / "j") as journal:
        journal.begin("r", 1, PLAN)
        journal.add("r", decision(1))
        poison(journal, kind)
        journal.add("r", decision(2))
        wait_until(lambda: journal.recorded("r", 1) == 2, 10, "the steps of the other run")
        assert journal.recorded("x", 1) == (0 if kind == "first step" else 1)
    assert caplog.text.count("a row is left out") == 1
    with opened(tmp_path / "j") as journal:
        runs = {run.run_id: list(run.steps) for run in journal.stored()}
    assert runs == {"r": [1, 2]} | ({} if kind == "first step" else {"x": [1]})


def garbage(path: Path) -> None:
    path.write_bytes(b"no database " * 100)


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE other (x)")


def other_version(path: Path) -> None:
    write(path, range(1, 2))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def folder(path: Path) -> None:
    path.mkdir()


def nothing(path: Path) -> None:
    pass


WRONG = [
    ("j", "this file is not a database; name another", garbage),
    ("j", "not a journal of switokd", other_database),
    ("j", "has version 99", other_version),
    ("j", "this is a folder; name a file, such as j/journal.sqlite", folder),
    ("none/j", "none/j: there is no folder none; make it, or name another", nothing),
    ("j/j", "j/j: j is a file; name a file in a folder", garbage),
]


@pytest.mark.parametrize(("name", "words", "make"), WRONG, ids=[words for _, words, _ in WRONG])
def test_a_wrong_file_is_one_line_and_exit_code_2(
    name: str, words: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "j")
    command = [sys.executable, "-m", "switokd", "coordinator", "--journal", name, "--port", "0"]
    code, _, err = run([*command, "--http-port", "0"], tmp_path, 60)
    assert code == 2, err
    assert words in err
    assert len(err.splitlines()) == 1, err
    assert make is not garbage or [p.name for p in tmp_path.iterdir()] == ["j"]  # and no lock


def test_two_coordinators_do_not_share_a_journal(tmp_path: Path) -> None:
    with opened(tmp_path / "j"), pytest.raises(UsageError, match="another coordinator writes it"):
        SqliteJournal(tmp_path / "j")
