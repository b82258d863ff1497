"""The thread that sends heartbeats, without a coordinator.

Not covered: heartbeats of a real run (`tests/training/test_stuck.py`).
"""

from __future__ import annotations

from queue import SimpleQueue

import pytest

from switokd.coordination import heartbeat
from switokd.coordination.heartbeat import HeartbeatThread
from switokd.runtime.phase import Activity, Phase
from switokd.v1 import coordinator_pb2 as pb
from tests.support import wait_until


def test_heartbeats_tell_phase_and_step_until_the_thread_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    activity = Activity()
    monkeypatch.setattr(heartbeat, "ACTIVITY", activity)
    activity.begin(Phase.BACKWARD, 12)
    sent: SimpleQueue[pb.TrainRequest] = SimpleQueue()
    thread = HeartbeatThread(sent.put, timeout=0.1)
    first, second = (sent.get(timeout=10).heartbeat for _ in range(2))
    assert (first.phase, first.step, first.waits) == (pb.PHASE_BACKWARD, 12, False)
    assert first.phase_seconds < second.phase_seconds
    with activity.waiting():
        wait_until(lambda: sent.get(timeout=10).heartbeat.waits, 10, "a heartbeat that waits")
    thread.stop()
    thread.join(10)
    assert not thread.is_alive()
