"""A coordinator that is killed, stopped or replaced in the middle of a run changes no bit of it.

Real ranks and real coordinators. Not covered: every order of messages (`tests/simulation`).
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.preloaded import Forked, forked, train, train_ranks
from tests.support import lines, process, wait_until

# Some 240 steps of a few milliseconds.
WORDS = ["digits-2t1s", "schedule.epochs=4", "data.batch_size=24", "data.workers=0"]
WORDS += [f"networks.{n}.model=tests.sleepers:Flat" for n in ("teacher1", "teacher2", "student")]
WORDS += ["coordinator.deadline=0.3", "checkpoint.every_steps=50"]
RESULTS = ["decisions.jsonl", *(f"weights/{n}.pt" for n in ("teacher1", "teacher2", "student"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed"), 3, *WORDS)


def assert_same_bits(folder: Path, undisturbed: Path) -> None:
    for name in RESULTS:
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name


@dataclass
class Coordinator:
    """A coordinator of the user's own."""

    child: subprocess.Popen[str]
    address: str

    @property
    def port(self) -> str:
        return self.address.rpartition(":")[2]


@contextmanager
def coordinator(journal: Path | None, port: str = "0") -> Iterator[Coordinator]:
    command = [sys.executable, "-m", "switokd", "coordinator", "--port", port, "--http-port", "0"]
    command += ["--journal", str(journal)] if journal else []
    with process(command, Path.cwd()) as child:
        assert child.stdout is not None
        yield Coordinator(child, json.loads(child.stdout.readline())["grpc"])


@contextmanager
def training(folder: Path, *words: str) -> Iterator[Forked]:
    with forked(
        train_ranks, 3, (*WORDS, "run_dir=out", *words), cwd=folder, out=folder / "log"
    ) as child:
        yield child


def steps(folder: Path) -> int:
    path = folder / "out" / "decisions.jsonl"
    return path.read_text().count("\n") // 2 if path.exists() else 0


def wait_for_step(folder: Path, child: Forked, step: int) -> None:
    wait_until(lambda: child.poll() is not None or steps(folder) >= step, 60, f"step {step}")
    assert child.poll() is None, (folder / "log").read_text()


def assert_done(folder: Path, child: Forked, undisturbed: Path) -> None:
    assert child.wait(60) == 0, (folder / "log").read_text()
    assert_same_bits(folder / "out", undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_coordinator_that_starts_again_with_its_journal_goes_on(
    number: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.db"
    with ExitStack() as stack:
        first = stack.enter_context(coordinator(journal))
        child = stack.enter_context(training(tmp_path, f"coordinator.address={first.address}"))
        wait_for_step(tmp_path, child, 30)
        first.child.send_signal(number)
        first.child.wait(10)
        second = stack.enter_context(coordinator(journal, first.port))
        assert_done(tmp_path, child, undisturbed)
        second.child.send_signal(signal.SIGTERM)
        second.child.wait(10)
    assert_same_as_journal(journal, undisturbed)


def assert_same_as_journal(journal: Path, undisturbed: Path) -> None:
    """Every decision of the record is in the journal, with the same numbers."""
    columns = "step, teacher, student, gap, e_s, e_t, epsilon, delta, mode, n"
    with closing(sqlite3.connect(journal)) as connection:
        rows = connection.execute(f"SELECT {columns} FROM decisions ORDER BY step, place")
        names = columns.split(", ")
        found = [dict(zip(names, row, strict=True)) for row in rows]
        assert found == lines(undisturbed / "decisions.jsonl")
        assert connection.execute("SELECT ended, failure FROM runs").fetchall() == [(1, "")]


def test_a_coordinator_that_has_lost_its_journal_learns_from_the_ranks(
    undisturbed: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(coordinator(None))
        child = stack.enter_context(training(tmp_path, f"coordinator.address={first.address}"))
        wait_for_step(tmp_path, child, 30)
        first.child.kill()
        first.child.wait(10)
        wait_for_step(tmp_path, child, 105)  # the checkpoint has settled what was decided alone
        journal = tmp_path / "journal.db"
        with no_step_ends(child):  # the run could be over before the coordinator is back
            stack.enter_context(coordinator(journal, first.port))
            wait_until(lambda: decided_alone(journal) > 50, 30, "the ranks have told what they did")
        assert_done(tmp_path, child, undisturbed)


@contextmanager
def no_step_ends(child: Forked) -> Iterator[None]:
    """Stop one rank in the block: all others wait for it."""
    family = psutil.Process(child.pid).children(recursive=True)
    (rank,) = (p for p in family if p.name() == "switokd rank 2")
    rank.suspend()
    yield
    rank.resume()


def decided_alone(journal: Path) -> int:
    """Return the number of rows that the ranks have decided alone, as a journal has it."""
    with closing(sqlite3.connect(journal)) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM decisions WHERE alone = 1").fetchone()
    return int(rows)


SHARED = "{teacher1: [0, 1], teacher2: [1], student: [2]}"


@pytest.mark.parametrize("placement", ["dedicated", SHARED])
def test_without_a_coordinator_the_ranks_decide_alone_to_the_end(
    placement: str, undisturbed: Path, tmp_path: Path
) -> None:
    words = [f"placement={placement}"]
    expected = undisturbed
    if placement != "dedicated":
        expected = train(tmp_path / "undisturbed", 3, *WORDS, *words)
    with ExitStack() as stack:
        server = stack.enter_context(coordinator(None))
        words.append(f"coordinator.address={server.address}")
        child = stack.enter_context(training(tmp_path, *words))
        wait_for_step(tmp_path, child, 30)
        server.child.kill()
        assert_done(tmp_path, child, expected)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    ((first, last),) = summary["decided_alone"]
    assert 30 < first <= last  # polling may have noticed step 30 late
    assert last == steps(tmp_path)
    assert summary["steps_decided_alone"] == last - first + 1
    log = (tmp_path / "log").read_text()
    assert f"{last - first + 1} steps decided without the coordinator" in log
    told = [line for line in log.splitlines() if line.startswith("switokd: ")]
    assert len(told) == 1
    assert f"the coordinator at {server.address} went away" in told[0]
    assert "the ranks decide alone until it is back" in told[0]


def test_a_job_that_starts_again_does_not_need_its_coordinator(
    undisturbed: Path, tmp_path: Path
) -> None:
    with (
        coordinator(None) as first,
        training(tmp_path, f"coordinator.address={first.address}") as (child),
    ):
        wait_for_step(tmp_path, child, 60)
        os.killpg(child.pid, signal.SIGTERM)
        assert child.wait(30) == 143, (tmp_path / "log").read_text()
    words = (f"coordinator.address={first.address}", "resume=auto")
    with training(tmp_path, *words) as child:
        assert_done(tmp_path, child, undisturbed)
    log = (tmp_path / "log").read_text()
    assert f"the coordinator at {first.address} does not answer within 5 s; the ranks decide" in log


def test_a_coordinator_that_hangs_is_not_waited_for(undisturbed: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(coordinator(None))
        words = f"coordinator.address={server.address}"
        child = stack.enter_context(training(tmp_path, words))
        wait_for_step(tmp_path, child, 30)
        server.child.send_signal(signal.SIGSTOP)
        wait_for_step(tmp_path, child, 130)
        server.child.send_signal(signal.SIGCONT)  # its late decisions must be the same
        assert_done(tmp_path, child, undisturbed)


def test_a_runs_own_coordinator_is_started_again(undisturbed: Path, tmp_path: Path) -> None:
    with training(tmp_path) as child:
        wait_for_step(tmp_path, child, 30)
        family = psutil.Process(child.pid).children(recursive=True)
        (victim,) = (member for member in family if "coordinator" in member.cmdline())
        victim.kill()
        assert_done(tmp_path, child, undisturbed)
    log = (tmp_path / "log").read_text()
    assert f"the coordinator (process {victim.pid}) is gone and starts again" in log
    assert not victim.is_running()


def test_a_run_that_must_wait_goes_on_when_the_coordinator_is_back(
    undisturbed: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(coordinator(None))
        words = [f"coordinator.address={first.address}", "coordinator.on_loss=wait"]
        child = stack.enter_context(training(tmp_path, *words))
        wait_for_step(tmp_path, child, 30)
        first.child.kill()
        first.child.wait(10)
        stack.enter_context(coordinator(None, first.port))
        assert_done(tmp_path, child, undisturbed)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["restarts"] == summary["steps_decided_alone"] == 0
    _, back = (li for li in (tmp_path / "log").read_text().splitlines() if li[:8] == "switokd:")
    assert f"the coordinator at {first.address} is back after" in back
