"""`switokd train` as a launcher: exit codes, and what it says when a rank ends badly."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import process, run, wait_until

TRAIN = [sys.executable, "-m", "switokd", "train", "digits-1t1s", "run_dir=out"]


def test_a_mistake_that_only_a_rank_finds_has_exit_code_2_and_one_line(tmp_path: Path) -> None:
    code, out, err = run([*TRAIN, "networks.student.model=wrn-9-1"], tmp_path)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("switokd: rank 1 (student): model wrn-9-1 cannot be made")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, 4)]
)
def test_signals(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM to the launcher; SIGKILL to the student's rank."""
    log = tmp_path / "log"
    with process([*TRAIN, "schedule.epochs=500"], tmp_path, log) as child:
        record = tmp_path / "out" / "decisions.jsonl"
        wait_until(lambda: record.exists() and record.stat().st_size > 999, 60, "some steps")
        family = psutil.Process(child.pid).children(recursive=True)
        if number == signal.SIGKILL:
            (victim,) = [p for p in family if p.environ().get("RANK") == "1"]
            victim.kill()
        else:
            child.send_signal(number)
        assert child.wait(30) == code, log.read_text()
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        assert gone
    text = log.read_text()
    assert "Traceback" not in text
    if number == signal.SIGKILL:
        assert f"rank 1 (student), process {victim.pid}, was killed by SIGKILL" in text
