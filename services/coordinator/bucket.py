"""A token bucket: how fast the messages of one stream may come.

A stream that is too fast is not refused: it is read more slowly, and HTTP/2 then holds its sender
back. A rank may therefore report again at once what a lost coordinator has forgotten.

Not covered: what is counted (`session.py`, `pace.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

BYTES_PER_TOKEN = 2048
"""A message takes one token, and one more for every 2,048 bytes."""


class TokenBucket:
    """Tokens of one stream. rate: tokens per second. burst: the most that it can hold."""

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens = burst
        self._filled_at = clock()

    def take(self, size: int) -> float:
        """Take the tokens of a message of `size` bytes; return the seconds to wait after it."""
        self._tokens -= 1 + size // BYTES_PER_TOKEN
        if self._tokens >= 0:  # the clock is only looked at when the tokens have run out
            return 0.0
        now = self._clock()
        self._tokens += (now - self._filled_at) * self._rate
        self._tokens = min(self._tokens, self._burst)
        self._filled_at = now
        return max(-self._tokens / self._rate, 0.0)

    def give_back(self) -> None:
        """Give back the token of what was refused instead."""
        self._tokens += 1
