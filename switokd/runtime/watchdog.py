"""Reports a wait that takes too long.

Not covered: ending the process that waits (`lifecycle.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from switokd.runtime.lifecycle import WATCH_SECONDS


class Watchdog:
    """Calls `report` once if the main thread waits longer than `seconds`.

    For collectives in a GPU's queue, which neither end nor raise an error when a peer hangs. The
    forward pass and evaluation are not watched: there, a rank that waits in SyncBatchNorm looks
    like a rank that hangs.
    report: gets a description of the operation that the main thread waits for.
    """

    def __init__(self, seconds: float, report: Callable[[str], None]) -> None:
        self._seconds, self._report = seconds, report
        self._waiting: tuple[float, str] | None = None
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def begin(self, doing: str) -> None:
        """Note that the main thread starts to wait. doing: describes the operation."""
        self._waiting = time.monotonic(), doing

    def over(self) -> None:
        """Note that the wait is over."""
        self._waiting = None

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Watch the body of the `with` statement."""
        self.begin(doing)
        try:
            yield
        finally:
            self.over()

    def _watch(self) -> None:
        while True:
            time.sleep(min(WATCH_SECONDS, self._seconds))
            waiting = self._waiting
            if waiting and time.monotonic() - waiting[0] > self._seconds:
                self._report(waiting[1])
                return
