"""Adds up how long a part of the step takes, on the CPU's clock or the GPU's.

A GPU works through its queue long after the call that filled it has returned, so there the time
between two marks in the queue is taken, and read when the training pauses anyway.

Not covered: where the time goes inside the part (a profiler shows that).
"""

from __future__ import annotations

import time
from collections import deque

import torch

Marks = tuple[torch.cuda.Event, torch.cuda.Event]


class Timer:
    """Use it as a context: `with watch: ...`; then `seconds`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._seconds = 0.0
        self._marks: deque[Marks] = deque()
        self._spare: list[Marks] = []
        self._started = 0.0

    def __enter__(self) -> None:
        if self._gpu:
            while self._marks and _passed(self._marks[0][1]):  # may be used again
                self._add_first()
            self._marks.append(self._spare.pop() if self._spare else (_mark(), _mark()))
            self._marks[-1][0].record(torch.cuda.current_stream(self._gpu))
        self._started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        if self._gpu:
            self._marks[-1][1].record(torch.cuda.current_stream(self._gpu))
        else:
            self._seconds += time.perf_counter() - self._started

    @property
    def seconds(self) -> float:
        """All parts so far. On a GPU this waits for the last of them."""
        while self._marks:
            self._marks[0][1].synchronize()
            self._add_first()
        return self._seconds

    def _add_first(self) -> None:
        begin, end = self._marks.popleft()
        self._seconds += begin.elapsed_time(end) / 1000
        self._spare.append((begin, end))


def _passed(mark: torch.cuda.Event) -> bool:
    return bool(mark.query())  # type: ignore[no-untyped-call]


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
