"""Order of the trials and handling of failures, with small real processes.

Not covered: `switokd train` as a trial (`tests/cli/test_compare.py`).
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
    RunningTrial,
    failure_of,
    last_lines,
    locked,
    run_trials,
    stop,
    threads,
)
from switokd.runs.compare.trials import Trial, make_trials, parse_strategies


class RecordingDisplay:
    """A display that records its events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.max_running = 0

    def started(self, trial: Trial) -> None:
        self.events.append(("started", trial.folder.name))

    def update(self, running: Sequence[RunningTrial]) -> None:
        self.max_running = max(self.max_running, len(running))

    def ended(self, trial: Trial, seconds: float, failure: Failure | None) -> None:
        self.events.append(("failed" if failure else "ended", trial.folder.name))


def use_short_programs(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
    """Replace each trial by a short program; the trial in the folder `failing` fails."""

    def start(trial: Trial, jobs: int, logs: Path, lock: int) -> RunningTrial:
        code = 3 if trial.folder.name == failing else 0
        output = "switokd: network student is not finite" if code else "done"
        program = f"print({output!r}); raise SystemExit({code})"
        log = logs / trial.folder.name
        with log.open("w") as file:
            process = subprocess.Popen([sys.executable, "-c", program], stdout=file)
        return RunningTrial(trial, process, log, time.monotonic())

    monkeypatch.setattr(runner, "start", start)


def trials(out: Path, strategies: str, seeds: Sequence[int] = (0,)) -> list[Trial]:
    return make_trials("digits-1t1s", [], parse_strategies(strategies), seeds, out)


def test_trials_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_short_programs(monkeypatch)
    display = RecordingDisplay()
    assert run_trials(trials(tmp_path, "dml,switokd"), 1, tmp_path, 0, display) == {}
    assert display.events == [
        ("started", "dml-0"),
        ("ended", "dml-0"),
        ("started", "switokd-0"),
        ("ended", "switokd-0"),
    ]


def test_several_run_at_once_and_kd_after_its_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_short_programs(monkeypatch)
    display = RecordingDisplay()
    assert run_trials(trials(tmp_path, "kd,vanilla,dml", (0, 1)), 2, tmp_path, 0, display) == {}
    assert display.max_running == 2
    assert display.events[:2] == [("started", "vanilla-0"), ("started", "dml-0")]
    for seed in (0, 1):
        taught = display.events.index(("ended", f"vanilla-{seed}"))
        assert display.events.index(("started", f"kd-{seed}")) > taught


def test_other_trials_continue_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_short_programs(monkeypatch, failing="vanilla-0")
    display = RecordingDisplay()
    failed = run_trials(trials(tmp_path, "kd,dml", (0, 1)), 1, tmp_path, 0, display)
    assert {path.name: failure.exit_code for path, failure in failed.items()} == {
        "vanilla-0": 3,
        "kd-0": 3,
    }
    vanilla, kd = failed.values()
    log = tmp_path / "vanilla-0"
    assert vanilla.reason == f"exit code 3: network student is not finite (see {log})"
    assert kd.reason == f"not run, because {log}, which trains its teachers, failed"
    ended = [name for event, name in display.events if event == "ended"]
    assert sorted(ended) == ["dml-0", "dml-1", "kd-1", "vanilla-1"]
    assert ("started", "kd-0") not in display.events


def test_a_killed_trial_has_the_exit_code_of_a_lost_process(tmp_path: Path) -> None:
    (trial,) = trials(tmp_path, "dml")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.kill()
    process.communicate()
    log = tmp_path / "none"
    assert failure_of(RunningTrial(trial, process, log, 0.0)) == Failure(
        4, f"killed by signal 9 (see {log})"
    )


def test_stop_kills_a_process_that_ignores_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.2)
    program = (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
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
