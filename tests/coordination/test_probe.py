"""A wrong address of the coordinator is told at once, and ends the run by coordinator.timeout.

Not covered: a host that drops packets; here it would have to be on another machine.
"""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from switokd.config.sections import Coordinator
from switokd.coordination.probe import probing
from tests.support import process, switokd_train, wait_until


def said_within(address: str, seconds: float) -> list[str]:
    said: list[str] = []
    with probing(Coordinator(address=address, timeout=7.0), said.append):
        deadline = time.monotonic() + seconds
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
    return said


def test_nothing_at_the_address_is_said_once() -> None:
    (line,) = said_within("127.0.0.1:1", 10)
    assert line.startswith("waiting for the coordinator at 127.0.0.1:1, for up to 7 s (coordinator")
    (line,) = said_within("no-such-host.invalid:50051", 20)
    assert "no-such-host.invalid:50051" in line


def test_nothing_is_said_where_something_answers_or_nothing_is_awaited() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert said_within(f"127.0.0.1:{server.getsockname()[1]}", 1.5) == []
    assert said_within("auto", 0.1) == []


@pytest.mark.timeout(100)
def test_a_run_says_so_before_pytorch_is_there_and_ends_in_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = ["coordinator.address=127.0.0.1:1", "coordinator.timeout=2"]
    with process(switokd_train(2, "digits-1t1s", *settings), tmp_path, log) as training:
        wait_until(log.read_text, 30, "a line about the coordinator")
        (line,) = log.read_text().splitlines()
        assert "waiting for the coordinator at 127.0.0.1:1, for up to 2 s" in line
        assert training.wait(60) == 4
    absent = "the coordinator at 127.0.0.1:1 does not answer within 2 s"
    assert log.read_text().count(absent) == 1, "the ranks say it together"


@pytest.mark.timeout(100)
def test_a_run_that_is_stopped_while_it_waits_leaves_no_folder(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = ["coordinator.address=127.0.0.1:1", "coordinator.timeout=90", "run_dir=out"]
    with process(switokd_train(2, "digits-1t1s", *settings), tmp_path, log) as training:
        said = "waiting for the coordinator"  # by the launcher, and by rank 0
        wait_until(lambda: log.read_text().count(said) == 2, 60, "rank 0 waits")
        training.send_signal(signal.SIGTERM)
        assert training.wait(30) == 143
    assert log.read_text().splitlines()[-1] == "switokd: stopped by SIGTERM"
    assert not (tmp_path / "out").exists()
