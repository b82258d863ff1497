"""Queues of the responses that wait to be sent to ranks.

A rank that does not read loses its stream once too many responses wait for it.

Not covered: a second stream of the same rank (`session.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from switokd.services.coordinator.limits import DEFAULTS, Limits, exceeded

STREAMS_AT_ONCE = 64
"""Streams that get a response at once, within some tenths of a millisecond."""


@dataclass(frozen=True)
class StreamEnd:
    """Last item of an outbox: the status that ends the stream. OK answers Leave."""

    code: grpc.StatusCode
    details: str = ""


class Outbox:
    """Serialized responses for one stream, then the stream's end.

    asyncio.Queue does the same at twice the cost. on_full: called once too many items wait.
    """

    def __init__(
        self, limits: Limits = DEFAULTS, on_full: Callable[[], None] = lambda: None
    ) -> None:
        self._items: deque[bytes | StreamEnd] = deque()
        self._wakeup: asyncio.Future[None] | None = None
        self._most, self._on_full = limits.max_waiting_responses, on_full
        self._is_full = False

    def put(self, item: bytes | StreamEnd) -> None:
        """Add an item at the end; does not wait."""
        self._items.append(item)
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def broadcast(self, item: bytes) -> None:
        """Add an item, unless too many wait: then end the stream, whose rank may come back."""
        if len(self._items) < self._most:
            self.put(item)
        elif not self._is_full:
            self._is_full = True
            self._items.clear()
            full = exceeded(
                f"{self._most} responses wait for a rank that does not read them",
                "max_waiting_responses",
                self._most,
            )
            self.put(StreamEnd(grpc.StatusCode.RESOURCE_EXHAUSTED, str(full)))
            self._on_full()

    async def get(self) -> bytes | StreamEnd:
        """Wait for the first item and remove it. Only one task may call this."""
        while not self._items:
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        return self._items.popleft()


class RunStreams:
    """Outboxes of all open streams of one run."""

    def __init__(self) -> None:
        self._outboxes: dict[int, Outbox] = {}
        self._unsent: deque[tuple[bytes, list[Outbox]]] = deque()
        """Responses, the oldest first, with the outboxes that do not have them yet."""
        self._have_failed = False

    def __len__(self) -> int:
        return len(self._outboxes)

    def add(self, rank: int, outbox: Outbox) -> None:
        """Send all later responses of the run to this rank as well."""
        if before := self._outboxes.get(rank):
            before.put(StreamEnd(grpc.StatusCode.UNAVAILABLE, "the rank has a newer stream"))
        self._outboxes[rank] = outbox

    def is_open(self, rank: int, outbox: Outbox) -> bool:
        """Whether this is the rank's stream, and no newer one has replaced it."""
        return self._outboxes.get(rank) is outbox

    def remove(self, rank: int) -> None:
        """Send this rank nothing more."""
        del self._outboxes[rank]

    def send(self, response: bytes) -> None:
        """Send one serialized response to every rank, in the order of the responses.

        `STREAMS_AT_ONCE` ranks get it now, the others in the next turns of the event loop.
        """
        is_idle = not self._unsent
        self._unsent.append((response, list(self._outboxes.values())))
        if is_idle:
            self._send_some()

    def _send_some(self) -> None:
        response, outboxes = self._unsent.popleft()
        # The more responses wait, the more is sent at once: so they cannot pile up.
        count = STREAMS_AT_ONCE * (1 + len(self._unsent))
        for outbox in outboxes[:count]:
            outbox.broadcast(response)
        if rest := outboxes[count:]:
            self._unsent.appendleft((response, rest))
        if self._unsent:
            asyncio.get_running_loop().call_soon(self._send_some)

    def send_to(self, rank: int, response: bytes) -> None:
        """Send one serialized response to one rank, if it has a stream."""
        if outbox := self._outboxes.get(rank):
            outbox.broadcast(response)

    def drain(self) -> None:
        """End every stream with UNAVAILABLE: its rank is to try again elsewhere, or later."""
        for outbox in self._outboxes.values():
            outbox.put(StreamEnd(grpc.StatusCode.UNAVAILABLE, "the coordinator stops"))

    def fail(self, reason: str) -> bool:
        """End every stream with ABORTED; return False if this has been done before."""
        if self._have_failed:
            return False
        self._have_failed = True
        for outbox in self._outboxes.values():
            outbox.put(StreamEnd(grpc.StatusCode.ABORTED, reason))
        return True
