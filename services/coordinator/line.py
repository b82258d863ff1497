"""The line in which calls wait while many come, so that a burst does not hold up other callers.

gRPC hands over one call at a time, in the order in which they came, whoever makes them. If each was
answered at once, a first call of another connection would wait for all answers of a burst. So the
calls of a burst are taken over first, which costs less. They are answered once no more come for
`QUIET_SECONDS`, or `LONGEST_SECONDS` after the one before. Connections take turns. A connection may
have a limited number of open calls, so a sender whose calls wait cannot make more of them.

The ranks' streams need no turn once they are open, and the event loop reads them in between.

Not covered: how many calls a connection may make, which of them need not wait (`pace.py`); calls
that gRPC has not handed over.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

QUIET_SECONDS = 0.002
"""If no call has come for so long, gRPC most likely holds no further one."""
LATE_SECONDS = 0.002
"""If the event loop is later than this, it is too busy for that to be known."""
LONGEST_SECONDS = 0.02
"""The longest pause between two turns, however many calls come."""


class Line:
    """Calls that wait, by connection. clock: returns seconds. Only for the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: dict[str, dict[asyncio.Future[None], None]] = {}
        """By connection: its calls, the oldest first."""
        self._order: deque[str] = deque()
        """Connections with calls, in the order of their turns."""
        self._busy_at = self._turn_at = clock()
        """When the last call came or had its turn; when the last one had its turn."""
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def __len__(self) -> int:
        """Return the number of calls that wait."""
        return sum(map(len, self._calls.values()))

    async def enter(self, connection: str, at_once: bool = False) -> None:
        """Note a call of a connection, and wait for its turn. at_once: the call need not wait."""
        now = self._clock()
        was_quiet, self._busy_at = now - self._busy_at >= QUIET_SECONDS, now
        if at_once or (was_quiet and not self._calls):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if connection not in self._calls:
            self._calls[connection] = {}
            self._order.append(connection)
        self._calls[connection][turn] = None
        if self._timer is None:
            self._look_later(QUIET_SECONDS)
        try:
            await turn
        finally:  # also if the caller has gone meanwhile
            if calls := self._calls.get(connection):
                calls.pop(turn, None)

    def _look_later(self, seconds: float) -> None:
        self._due = self._clock() + seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """Give the next call its turn, unless more calls come just now; look again later."""
        now = self._clock()
        is_late = now - self._due > LATE_SECONDS
        is_quiet = now - self._busy_at >= QUIET_SECONDS and not is_late
        if is_quiet or now - self._turn_at >= LONGEST_SECONDS:
            self._busy_at = self._turn_at = now
            self._give_turn()
        self._timer = None
        if self._calls:
            self._look_later(QUIET_SECONDS)

    def _give_turn(self) -> None:
        while self._order:
            connection = self._order.popleft()
            calls = self._calls[connection]
            waiting = next((call for call in calls if not call.done()), None)
            if waiting is not None:  # those before it have gone, and take themselves out
                del calls[waiting]
                waiting.set_result(None)
            if waiting is not None and calls:
                self._order.append(connection)
            else:
                del self._calls[connection]
            if waiting is not None:
                return
