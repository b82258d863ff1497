"""In which order trials are run, and what becomes of one that fails, with small real processes.

Not covered: `switokd train` as a trial (`test_compare_command.py`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from switokd.errors import UsageError
from switokd.runs.compare import runner
from switokd.runs.compare.runner import (
    Failure,
    Running,
    failure_of,
    last_lines,
    locked,
    run_trials,
    stop,
    threads,
)
from switokd.runs.compare.trials import Trial, make_trials, parse_strategies


class Diary:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.most = 0

    def started(self, trial: Trial) -> None:
        self.events.append(("started", trial.folder.name))

    def update(self, running: Sequence[Running]) -> None:
        self.most = max(self.most, len(running))

    def ended(self, trial: Trial, seconds: float, failure: Failure | None) -> None:
        self.events.append(("failed" if failure else "ended", trial.folder.name))


def small(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
    """Let each trial be a short program; it fails where the folder's name is `failing`."""

    def start(trial: Trial, jobs: int, logs: Path, lock: int) -> Running:
        code = 3 if trial.folder.name == failing else 0
        words = "switokd: network student is not finite" if code else "done"
        program = f"print({words!r}); raise SystemExit({code})"
        log = logs / trial.folder.name
        with log.open("w") as file:
            process = subprocess.Popen([sys.executable, "-c", program], stdout=file)
        return Running(trial, process, log, time.monotonic())

    monkeypatch.setattr(runner, "start", start)


def trials(out: Path, strategies: str, seeds: Sequence[int] = (0,)) -> list[Trial]:
    return make_trials("digits-1t1s", [], parse_strategies(strategies), seeds, out)


def test_trials_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    diary = Diary()
    assert run_trials(trials(tmp_path, "dml,switokd"), 1, tmp_path, 0, diary) == {}
    assert diary.events == [
        ("started", "dml-0"),
        ("ended", "dml-0"),
        ("started", "switokd-0"),
        ("ended", "switokd-0"),
    ]


def test_several_run_at_once_and_kd_after_its_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    diary = Diary()
    assert run_trials(trials(tmp_path, "kd,vanilla,dml", (0, 1)), 2, tmp_path, 0, diary) == {}
    assert diary.most == 2
    assert diary.events[:2] == [("started", "vanilla-0"), ("started", "dml-0")]
    for seed in (0, 1):
        taught = diary.events.index(("ended", f"vanilla-{seed}"))
        assert diary.events.index(("started", f"kd-{seed}")) > taught


def test_others_go_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, failing="vanilla-0")
    diary = Diary()
    failed = run_trials(trials(tmp_path, "kd,dml", (0, 1)), 1, tmp_path, 0, diary)
    assert {path.name: failure.exit_code for path, failure in failed.items()} == {
        "vanilla-0": 3,
        "kd-0": 3,
    }
    vanilla, kd = failed.values()
    log = tmp_path / "vanilla-0"
    assert vanilla.reason == f"exit code 3: network student is not finite (see {log})"
    assert kd.reason == f"not run, because {log}, which trains its teachers, failed"
    ended = [name for event, name in diary.events if event == "ended"]
    assert sorted(ended) == ["dml-0", "dml-1", "kd-1", "vanilla-1"]
    assert ("started", "kd-0") not in diary.events


def test_killed_trial_is_a_lost_process(tmp_path: Path) -> None:
    (trial,) = trials(tmp_path, "dml")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.kill()
    process.communicate()
    log = tmp_path / "none"
    assert failure_of(Running(trial, process, log, 0.0)) == Failure(
        4, f"killed by signal 9 (see {log})"
    )


def test_stop_ends_what_does_not_end_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.2)
    deaf = (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", deaf], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        stop([process])
        assert process.returncode == -9


def test_lock_is_held_while_a_trial_lives(tmp_path: Path) -> None:
    waits = [sys.executable, "-c", "input()"]
    with locked(tmp_path) as lock:
        trial = subprocess.Popen(waits, stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(UsageError, match="at work in"), locked(tmp_path):
        pass
    trial.communicate(b"\n")
    with locked(tmp_path):
        pass


def test_cores_are_shared_among_trials_that_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switokd.runs.compare.runner.cores", lambda: 12)
    (two_ranks,) = trials(tmp_path, "dml")
    assert threads(two_ranks, 1) == {}
    assert threads(two_ranks, 3) == {"OMP_NUM_THREADS": "2"}
    assert threads(two_ranks, 30) == {"OMP_NUM_THREADS": "1"}


def test_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log) == []
    log.write_text("first\n" + "x" * 5000 + "\n\n  last but one \nlast\n")
    assert last_lines(log)[-2:] == ["last but one", "last"]
    assert "first" not in last_lines(log)
