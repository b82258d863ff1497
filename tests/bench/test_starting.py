"""The benchmark of a start: time to the first step, memory of all processes of a run.

Not covered: the values of the figures.
"""

from __future__ import annotations

import sys

import pytest

from bench import starting

# A command with known durations and memory: these are what is measured.
TWO_STEPS = """
import subprocess, sys, time
from pathlib import Path

child = subprocess.Popen([sys.executable, "-c", "import time; x = b'x' * 2**26; time.sleep(2)"])
time.sleep(1)
folder = Path(sys.argv[-1].removeprefix("run_dir="))
folder.mkdir()
(folder / "decisions.jsonl").write_text("{}")
child.wait()
"""


def test_a_start_is_watched_until_the_first_decision_with_all_its_processes() -> None:
    start = starting.watch([sys.executable, "-c", TWO_STEPS])
    assert 1 <= start.first_step_seconds < start.wall_seconds
    assert start.wall_seconds >= 2
    assert start.peak_mib > 64


def test_a_start_that_fails_is_an_error_with_its_output() -> None:
    with pytest.raises(RuntimeError, match="no such recipe"):
        starting.watch([sys.executable, "-c", "raise SystemExit('no such recipe')"])


def test_both_sides_of_a_start_are_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([2.0, 4.0, 3.0, 4.0, 5.0, 4.0, 2.0, 4.0, 2.0, 4.0])
    sides: list[bool] = []

    def watch(command: list[str]) -> starting.Start:
        sides.append("torch.distributed.run" in command)
        value = next(seconds)
        return starting.Start(value, 10 * value, 2 * value)

    monkeypatch.setattr(starting, "watch", watch)
    monkeypatch.setattr(starting, "restart_seconds", lambda quick: 1.5)
    first, memory, restart = starting.measure(False, lambda text: None)
    assert sides == [False, True] * 5
    assert (first.name, memory.name, restart.name) == starting.FIGURES
    assert (restart.value, restart.reached) == (1.5, True)
    assert first.value == memory.value == 0.5
    assert first.details["wall_seconds of torchrun"] == [8.0] * 5
