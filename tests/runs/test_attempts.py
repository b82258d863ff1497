"""What the interruptions of a run cost, with a clock that the test sets.

Not covered: real interruptions (`tests/training/test_resume.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from switokd.runs import attempts
from switokd.runs.attempts import Attempts


class Clock:
    now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(attempts, "time", made)
    return made


def first(folder: Path) -> Attempts:
    """A run whose command was started 5 s before its folder was made."""
    run = Attempts(folder)
    run.start(0, 0, 995.0)
    run.begin_training()
    return run


def test_a_run_without_interruption_has_lost_nothing(tmp_path: Path, clock: Clock) -> None:
    run = first(tmp_path)
    clock.now = 1095.0
    run.finish(50)
    assert run.summary(80.0) == {
        "restarts": 0,
        "steps_lost": 0,
        "seconds_lost": 0.0,
        "seconds_since_first_start": 100.0,
        "effective_training_ratio": 0.8,
    }


def test_a_finished_run_that_is_trained_on_was_not_interrupted(
    tmp_path: Path, clock: Clock
) -> None:
    run = first(tmp_path)
    clock.now = 1095.0
    run.finish(50)
    clock.now = 2000.0
    again = Attempts(tmp_path)
    again.start(50, 0)
    assert again.restarts == 0
    third = Attempts(tmp_path)  # after an interruption
    third.start(60, 2)
    assert third.restarts == 1


def test_the_time_from_the_checkpoint_to_the_next_step_is_lost(
    tmp_path: Path, clock: Clock
) -> None:
    run = first(tmp_path)
    clock.now = 1010.0
    kept = run.kept()
    clock.now = 1030.0  # killed, with 7 steps behind the checkpoint
    for now, lost in ((1030.0, 7), (1050.0, 3)):  # the second start is killed as well
        clock.now = now
        again = Attempts(tmp_path)
        again.start(20, lost)
        again.restore(kept)
        clock.now = now + 4
        again.begin_training()
    clock.now = 1095.0
    summary = again.summary(50.0)
    assert (summary["restarts"], summary["steps_lost"]) == (2, 10)
    assert summary["seconds_lost"] == 1054.0 - 1010.0
    assert summary["effective_training_ratio"] == 0.5
    later = Attempts(tmp_path)
    later.start(40, 0)
    later.restore(again.kept())
    clock.now = 1098.0
    later.begin_training()
    assert later.summary(50.0)["seconds_lost"] == 44.0 + 3.0


def test_without_a_checkpoint_everything_is_lost(tmp_path: Path, clock: Clock) -> None:
    first(tmp_path)
    clock.now = 1020.0
    again = Attempts(tmp_path)
    again.start(0, 12)
    again.begin_training()
    assert again.summary(0.0)["seconds_lost"] == 25.0


def test_the_time_after_a_finished_run_is_not_lost(tmp_path: Path, clock: Clock) -> None:
    run = first(tmp_path)
    clock.now = 1045.0
    kept = run.kept()
    run.finish(50)
    clock.now = 90_000.0  # a day later, for more epochs
    again = Attempts(tmp_path)
    again.start(50, 0)
    again.restore(kept)
    clock.now += 5
    again.begin_training()
    clock.now += 45
    summary = again.summary(80.0)
    assert summary["seconds_lost"] == 5.0
    assert summary["seconds_since_first_start"] == 100.0


def test_a_clock_that_was_set_back_and_a_damaged_file(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "attempts.jsonl").write_bytes(b"\xff torn")
    run = Attempts(tmp_path)
    run.start(20, 7)
    clock.now = 10.0
    run.begin_training()
    summary = run.summary(5.0)
    assert (summary["restarts"], summary["steps_lost"]) == (1, 7)
    assert summary["seconds_lost"] == summary["seconds_since_first_start"] == 0.0
    assert summary["effective_training_ratio"] == 1.0
