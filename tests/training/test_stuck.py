"""A rank that is stopped or hangs is named with its phase, and no process outlives the run.

Not covered: kinds of loss other than a hang (`test_faults.py`); the rules (`test_health.py`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.request import urlopen

import grpc
import psutil
import pytest

from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from switokd.wire import PHASE_FROM_WIRE
from tests.preloaded import forked, train_ranks
from tests.support import wait_until

TIMEOUT = 6.0
"""A rank is named after half of it, and the run ends soon after it."""

LINGER_SECONDS = 5.0
"""How long a process may outlive its run."""

# A stopped process sends nothing; one that waits sends heartbeats.
STUDENTS = """
import os
import signal
import threading
import time
from torch import nn
from switokd.coordination import heartbeat

def stop():
    # Stop this process once it has told its step: the second heartbeat follows the first.
    told, original = [], heartbeat.heartbeat
    heartbeat.heartbeat = lambda: told.append(1) or original()
    deadline = time.monotonic() + 20
    while len(told) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGSTOP)

class Network(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        if self.steps == 5:
            self.fifth_step()
        return super().forward(x.flatten(1))

    def fifth_step(self):
        pass

class StopsInTraining(Network):
    def fifth_step(self):
        stop()

class StopsInEvaluation(Network):
    def fifth_step(self):
        if not self.training:
            stop()

class HangsInEvaluation(Network):
    def fifth_step(self):
        if not self.training:
            threading.Event().wait()
"""
NOTICE = r"^switokd: rank 1 \(student\) has .*{}.*; the other ranks wait for it$"


@pytest.mark.parametrize(
    ("student", "phase", "place", "reason"),
    [
        (
            "StopsInTraining",
            "forward",
            "in forward of step 5",
            r"(no report of step 5|did not answer) .*in forward of step 5",
        ),
        (
            "StopsInEvaluation",
            "evaluating",
            "in evaluating after step 5",
            r"no heartbeat for .* in evaluating after step 5.*: it hangs \(coordinator.timeout 6\)",
        ),
        (
            "HangsInEvaluation",
            "evaluating",
            "in evaluating after step 5",
            r"in evaluating after step 5 for \d+ s; .*: it hangs \(coordinator.timeout 6\)",
        ),
    ],
)
def test_a_stuck_rank_is_named_with_its_phase_and_no_process_is_left(
    student: str, phase: str, place: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "stuck.py").write_text(STUDENTS)
    log = tmp_path / "log"
    log.touch()
    words = ["digits-1t1s", "run_dir=out", f"coordinator.timeout={TIMEOUT}", "schedule.max_steps=5"]
    words += ["networks.teacher.model=stuck:Network", f"networks.student.model=stuck:{student}"]
    with forked(train_ranks, 2, tuple(words), cwd=tmp_path, out=log) as child:
        notice = re.compile(NOTICE.format(place), re.M)
        wait_until(lambda: notice.search(log.read_text()) or child.poll(), 90, "the notice")
        assert child.poll() is None, log.read_text()
        family = psutil.Process(child.pid).children(recursive=True)
        assert_status_and_metrics(family, tmp_path / "out", log.read_text(), phase)
        assert child.wait(30) == 4
        _, alive = psutil.wait_procs(family, timeout=LINGER_SECONDS)
        assert not alive
    text = log.read_text()
    assert len(notice.findall(text)) == 1, text
    assert re.search(rf"^switokd: .*rank 1 \(student\).*({reason})", text, re.M), text


def assert_status_and_metrics(
    family: list[psutil.Process], run: Path, log: str, phase: str
) -> None:
    """Check that both name rank 1 with its phase, and no other rank."""
    (http,) = re.findall(r"http://127\.0\.0\.1:(\d+)/, metrics at /metrics", log)
    (coordinator,) = (member for member in family if "coordinator" in member.cmdline())
    listening = {c.laddr.port for c in coordinator.net_connections() if c.status == "LISTEN"}
    (port,) = listening - {int(http)}
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = pb_grpc.CoordinatorServiceStub(channel)
        status = stub.GetRunStatus(pb.GetRunStatusRequest(run_id=run_id), timeout=10)
    assert [(r.rank, list(r.networks), r.is_waited_for) for r in status.ranks] == [
        (0, ["teacher"], False),
        (1, ["student"], True),
    ]
    stuck = status.ranks[1].heartbeat
    assert (PHASE_FROM_WIRE[stuck.phase], stuck.step, stuck.waits) == (phase, 5, False)
    assert "rank 1 (student)" in status.waiting_for[0]
    with urlopen(f"http://127.0.0.1:{http}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    labels = f'phase="{phase}",rank="1",run="{run_id}"'
    (seconds,) = re.findall(rf"^switokd_rank_phase_seconds{{{labels}}} (.*)$", text, re.M)
    assert float(seconds) > TIMEOUT / 2
    assert f'switokd_rank_waited_for{{rank="1",run="{run_id}"}} 1.0' in text
    assert f'switokd_rank_waited_for{{rank="0",run="{run_id}"}} 0.0' in text
    assert f'switokd_heartbeat_age_seconds{{rank="1",run="{run_id}"}}' in text
