"""Adds up the time that a part of the step takes, on the CPU's clock or the GPU's.

A call returns long before the GPU has finished the work that the call queued. On a GPU the timer
therefore takes the time between two CUDA events in the queue. It reads the events when the
training waits for the GPU anyway.

Not covered: where the time goes inside the part (use a profiler).
"""

from __future__ import annotations

import time
from collections import deque

import torch

EventPair = tuple[torch.cuda.Event, torch.cuda.Event]


class Timer:
    """A context manager that adds up the time spent inside; read the sum from `seconds`.

    device: where the work runs; None: the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._seconds = 0.0
        self._pending: deque[EventPair] = deque()
        self._unused: list[EventPair] = []
        self._started = 0.0

    def __enter__(self) -> None:
        if self._gpu:
            while self._pending and _is_done(self._pending[0][1]):  # reuse events
                self._add_first()
            self._pending.append(self._unused.pop() if self._unused else (_event(), _event()))
            self._pending[-1][0].record(torch.cuda.current_stream(self._gpu))
        self._started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        if self._gpu:
            self._pending[-1][1].record(torch.cuda.current_stream(self._gpu))
        else:
            self._seconds += time.perf_counter() - self._started

    @property
    def seconds(self) -> float:
        """Sum of all times so far. On a GPU this waits for the last timed part."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._add_first()
        return self._seconds

    def restart(self, seconds: float) -> None:
        """Continue from the sum of an earlier process."""
        self._seconds = seconds

    def _add_first(self) -> None:
        begin, end = self._pending.popleft()
        self._seconds += begin.elapsed_time(end) / 1000
        self._unused.append((begin, end))


def _is_done(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
