"""How a rank ends, without a training: the launcher is gone, a wait takes too long.

Not covered: whole runs whose parts are killed (`test_faults.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from switokd.errors import UsageError
from switokd.runtime import lifecycle
from switokd.runtime.watchdog import Watchdog
from tests.support import process, wait_until

LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "rank.py"], stdin=subprocess.PIPE).wait()
"""
RANK = """
import sys
from switokd.runtime.environment import environment
from switokd.errors import CollectiveError
from switokd.runtime.lifecycle import follow_launcher, one_line_errors

env = environment()
follow_launcher(env)
with one_line_errors(env, "rank 0"):
    print("ready", flush=True)
    sys.stdin.read()  # as from the launcher's store, which ends just before the launcher
    raise CollectiveError("joining the process group", "connection closed")
"""
TORCHRUNS = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "TORCHELASTIC_RUN_ID": "any",
}


def test_the_end_of_the_launchers_store_does_not_hide_that_the_launcher_is_gone(
    tmp_path: Path,
) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)
    log = tmp_path / "log"
    with process([sys.executable, "launcher.py"], tmp_path, log, **TORCHRUNS) as launcher:
        wait_until(lambda: "ready" in log.read_text(), 30, "a rank")
        (rank,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        _, alive = psutil.wait_procs([rank], timeout=15)
        assert not alive
    said = f"switokd: rank 0: the launcher (process {launcher.pid}) is gone"
    assert log.read_text().splitlines() == ["ready", said]


def test_what_takes_too_long_is_told_once_and_only_while_it_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def watching() -> int:
        return sum(thread.name == "watchdog" for thread in threading.enumerate())

    monkeypatch.setattr(lifecycle, "WATCH_SECONDS", 0.01)
    told: list[str] = []
    before = watching()
    patient, impatient = Watchdog(60.0, told.append), Watchdog(0.05, told.append)
    patient.begin("the first")
    for step in range(3):
        impatient.begin(f"step {step}")
        impatient.over()
    with impatient.during("a fourth"):
        pass
    impatient.begin("the last")
    begun = time.monotonic()
    wait_until(lambda: told, 10, "a word")
    assert time.monotonic() - begun > 0.05
    impatient.begin("another")
    wait_until(lambda: watching() == before + 1, 10, "the end of watching")
    assert told == ["the last"]


CHILD = "import sys, time; from switokd.runtime.lifecycle import end_with_parent; end_with_parent()"
CHILD += "; print('ready', flush=True); time.sleep(60)"


def test_a_process_ends_soon_after_the_one_that_it_must_not_outlive(tmp_path: Path) -> None:
    """Also while the other one is a zombie, and if it is not the parent."""
    log = tmp_path / "log"
    with process(["sleep", "60"], tmp_path) as other:
        command = [sys.executable, "-c", CHILD]
        with process(command, tmp_path, log, SWITOKD_PARENT=str(other.pid)) as child:
            wait_until(lambda: "ready" in log.read_text(), 30, "the child has started")
            assert child.poll() is None
            other.kill()
            assert child.wait(10) == -signal.SIGTERM


def test_what_is_left_of_a_process_group_is_killed_also_if_it_is_stopped() -> None:
    program = "sh -c 'kill -STOP $$; sleep 60' & sleep 60"
    leader = subprocess.Popen(["sh", "-c", program], start_new_session=True)
    children = psutil.Process(leader.pid).children
    stopped = psutil.STATUS_STOPPED
    wait_until(lambda: any(c.status() == stopped for c in children()), 10, "a stopped process")
    leader.kill()
    leader.wait()
    lifecycle.end_group(leader.pid, 0.2)
    wait_until(lambda: not lifecycle._has_running(leader.pid), 10, "the end of the group")
    lifecycle.end_group(leader.pid, 60)  # returns at once


def test_an_error_that_is_its_own_cause_is_told() -> None:
    error = UsageError("a mistake")
    error.__cause__ = error
    assert lifecycle.told(error) == "a mistake"


@pytest.mark.parametrize("launcher", ["torchrun", "another"])
def test_a_failing_rank_of_torchrun_wakes_the_stopped_ones(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process stands for the launcher. Another launcher kills its stopped ranks itself."""
    for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    env = {**os.environ, "TORCHELASTIC_RESTART_COUNT": "0"} if launcher == "torchrun" else None
    fails = "from switokd.runtime.environment import environment\n"
    fails += "from switokd.runtime.lifecycle import one_line_errors\n"
    fails += "from switokd.errors import PeerError\n"
    fails += "with one_line_errors(environment(), 'rank 0'):\n    raise PeerError('rank 1 hangs')"
    with subprocess.Popen(["sh", "-c", "kill -STOP $$; exit 7"]) as stopped:
        try:
            rank = psutil.Process(stopped.pid)
            wait_until(lambda: rank.status() == psutil.STATUS_STOPPED, 10, "a stopped rank")
            failed = subprocess.run([sys.executable, "-c", fails], env=env, capture_output=True)
            assert (failed.returncode, failed.stderr) == (4, b"switokd: rank 0: rank 1 hangs\n")
            if launcher == "torchrun":
                assert stopped.wait(10) == 7
            else:
                assert rank.status() == psutil.STATUS_STOPPED
        finally:
            stopped.kill()
