"""Reports a wait that takes too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from switokd.runtime.lifecycle import WATCH_SECONDS


class Watchdog:
    """Tells, once, what the main thread has been waiting for too long.

    For what neither ends by itself nor raises: a collective in a GPU's queue. Forward and
    evaluation are not watched: a rank that waits in SyncBatchNorm looks like one that hangs.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None]) -> None:
        self._seconds, self._tell = seconds, tell
        self._waiting: tuple[float, str] | None = None
        threading.Thread(target=self._watch, daemon=True, name="overdue").start()

    def begin(self, doing: str) -> None:
        """From now on the main thread waits."""
        self._waiting = time.monotonic(), doing

    def over(self) -> None:
        """It waits no more."""
        self._waiting = None

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """It waits in the body."""
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
                self._tell(waiting[1])
                return
