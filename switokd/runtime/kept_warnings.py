"""Keeps the warnings of this process for the run folder, besides saying them.

Rank 0 writes its own at once. The other ranks' wait until rank 0 collects them, at the end of each
epoch; those of an epoch that is not completed are said, but not kept.

Not covered: waits, which are said while they last; the file (`runs/run_folder.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from switokd.runtime.phase import ACTIVITY

MOST = 1000
"""Warnings that wait; later ones are said only."""

KeptWarning = dict[str, Any]
"""time (seconds since 1970), rank, step (0 before the first) and text."""


class WarningKeeper:
    """The warnings of one process; any thread may add one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rank = 0
        self._waiting: list[KeptWarning] = []
        self._write: Callable[[KeptWarning], None] | None = None

    def begin(self, rank: int) -> None:
        """Begin a run, whose rank this process is; forget what was kept before."""
        with self._lock:
            self._rank, self._waiting = rank, []

    def note(self, text: str) -> None:
        """Keep a warning."""
        moment = round(time.time(), 3)
        self.add([{"time": moment, "rank": self._rank, "step": ACTIVITY.now().step, "text": text}])

    def add(self, warnings: Iterable[KeptWarning]) -> None:
        """Keep warnings, also those of other ranks."""
        with self._lock:
            for warning in warnings:
                if self._write is not None:
                    self._write(warning)
                elif len(self._waiting) < MOST:
                    self._waiting.append(warning)

    def take(self) -> list[KeptWarning]:
        """Return the warnings that wait, and forget them."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        return waiting

    def write_with(self, write: Callable[[KeptWarning], None] | None) -> None:
        """Write the warnings that wait, and later ones at once; None: let them wait again.

        write: must neither raise an error nor warn.
        """
        with self._lock:
            self._write = write
        self.add(self.take())


WARNINGS = WarningKeeper()
"""The warnings of this process."""
