"""A file of the record: lines are only added, and a full disk loses none of them.

Lines that the disk does not take wait in memory, and follow as soon as there is space. They need
little memory: a million steps of two pairs take half a gigabyte.

Not covered: when lines count as recorded (`run_folder.py`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

RETRY_SECONDS = 1.0
"""Pause after a write that failed."""


class RecordFile:
    """Appends lines to a file. Methods may be called on several threads.

    on_warning: receives a sentence when the file cannot be written, and when it can be again.
    OSError if the file cannot be opened.
    """

    def __init__(self, path: Path, on_warning: Callable[[str], None]) -> None:
        self._path, self._on_warning = path, on_warning
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._failure: OSError | None = None
        self._tried_at = 0.0

    def append(self, lines: str) -> None:
        """Add whole lines; those that cannot be written now wait in memory."""
        with self._lock:
            self._waiting += lines.encode()
            if self._failure and time.monotonic() - self._tried_at < RETRY_SECONDS:
                return
            with suppress(OSError):
                self._write()

    def sync(self) -> None:
        """Put all lines on the disk; OSError if they do not fit."""
        with self._lock:
            self._write()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what waits, and close the file; OSError if lines are lost by that."""
        with self._lock:
            if self._file.closed:
                return
            try:
                self._write()
            finally:
                self._file.close()

    def _write(self) -> None:
        """Write what waits. What a write takes before it fails is written once."""
        self._tried_at = time.monotonic()
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if self._failure is None:
                self._on_warning(
                    f"{self._path} cannot be written: {error.strerror}; training goes on, and its "
                    "lines are kept in memory"
                )
            self._failure = error
            raise
        if self._failure is not None:
            self._on_warning(f"{self._path} is written again; no line is lost")
            self._failure = None
