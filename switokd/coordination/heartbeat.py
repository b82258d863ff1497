"""Tells the coordinator about once a second what this rank is doing.

A thread of its own sends the messages. None comes from a process that is stopped, or one of whose
threads lets no other thread run; the coordinator then names this rank.

Not covered: which rank the others wait for (`services/coordinator/health.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from switokd.runtime.phase import ACTIVITY
from switokd.runtime.usage import USAGE, gpu_memory_bytes, memory_bytes
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import PHASE_TO_WIRE

INTERVAL_SECONDS = 1.0
"""Longest time between two heartbeats; a tenth of `coordinator.timeout` if that is shorter."""
USAGE_BEATS = 5
"""Every so many heartbeats, the first one among them, say what the process uses."""


class HeartbeatThread(threading.Thread):
    """Sends heartbeats from its creation until `stop`.

    send: sends a message, or drops it while there is no coordinator; does not wait. timeout: of the
    coordinator, in seconds.
    """

    def __init__(self, send: Callable[[pb.TrainRequest], None], timeout: float) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self._send = send
        self._interval = min(INTERVAL_SECONDS, timeout / 10)
        self._is_over = threading.Event()
        self.start()

    def stop(self) -> None:
        """Send no further heartbeat; does not wait."""
        self._is_over.set()

    def run(self) -> None:
        """Send heartbeats; the thread calls this."""
        beats = 0
        while not self._is_over.wait(self._interval):
            message = heartbeat()
            if beats % USAGE_BEATS == 0:
                message.usage.CopyFrom(usage())
            self._send(pb.TrainRequest(heartbeat=message))
            beats += 1


def heartbeat() -> pb.Heartbeat:
    """Return the message about what this process is doing now."""
    doing = ACTIVITY.now()
    return pb.Heartbeat(
        phase=PHASE_TO_WIRE[doing.phase.value],
        step=doing.step,
        phase_seconds=doing.phase_seconds,
        still_seconds=doing.still_seconds,
        waits=doing.waits,
    )


def usage() -> pb.Usage:
    """Return the message about what this process has used."""
    return pb.Usage(
        phases=[
            pb.PhaseTime(phase=PHASE_TO_WIRE[phase.value], seconds=seconds)
            for phase, seconds in ACTIVITY.spent().items()
            if seconds
        ],
        memory_bytes=memory_bytes() or 0,
        gpu_memory_bytes=gpu_memory_bytes(),
        disk_free_bytes=USAGE.disk_free,
    )
