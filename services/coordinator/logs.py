"""The coordinator's log on standard error: one line per record, and not too many of a kind.

Names and sentences of ranks are in the log. A line break in one of them would forge a line, and a
stranger could fill the disk.

Not covered: what gRPC's own core writes; the command turns it off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from switokd.services.coordinator.text import clean

FORMAT = "%(asctime)s %(levelname)s %(message)s"
MOST_CHARACTERS = 4000
"""Longest line."""
MOST_KINDS = 1000


class LineFormatter(logging.Formatter):
    """Writes a record in one line; the lines of a traceback have bars between them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line without control characters."""
        line = clean(" | ".join(super().format(record).splitlines()))
        return line if len(line) <= MOST_CHARACTERS else line[:MOST_CHARACTERS] + " ... (cut)"


class RateFilter(logging.Filter):
    """Lets `rate` records of one kind pass in a second; counts the others.

    Records of one kind have the same text before their values are put in.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._rate, self._clock = rate, clock
        self._kinds: dict[str, tuple[float, int]] = {}
        """By kind: when its second began, and the number of records in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record may pass; the first of a second says how many did not."""
        kind, now = f"{record.name} {record.msg}"[:200], self._clock()
        began, count = self._kinds.get(kind, (now, 0))
        if now - began >= 1.0:
            if left_out := count - self._rate:
                self._say(record, left_out)
            began, count = now, 0
        if len(self._kinds) >= MOST_KINDS:
            self._kinds.clear()
        self._kinds[kind] = began, count + 1
        return count < self._rate

    @staticmethod
    def _say(record: logging.LogRecord, left_out: int) -> None:
        if left_out > 0:
            text = record.getMessage()
            record.msg, record.args = "%s (%d more lines like this were left out)", (text, left_out)


def configure_log(level: int, rate: int) -> None:
    """Log to standard error. rate: lines of one kind per second."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(FORMAT))
    handler.addFilter(RateFilter(rate))
    logging.basicConfig(level=level, handlers=[handler], force=True)
