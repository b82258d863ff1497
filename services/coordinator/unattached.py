"""Streams that are open and have not attached: each has a time limit, and so has their number.

An honest rank attaches within a round trip. If too many streams wait, the oldest one ends, so that
strangers keep no rank out.

Not covered: connections without a stream, which gRPC closes (`server.py`).
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc

from switokd.services.coordinator.limits import Limits, option
from switokd.services.coordinator.outbox import Outbox, StreamEnd


class Stream(Protocol):
    """What this module needs of a session."""

    outbox: Outbox

    @property
    def is_attached(self) -> bool:
        """Whether the stream has attached."""
        ...


class UnattachedStreams:
    """The streams that have not attached, the oldest first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._timers: dict[Stream, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return sum(not stream.is_attached for stream in self._timers)

    def add(self, stream: Stream) -> None:
        """Note a stream that was opened; end it later if it has not attached by then."""
        if len(self._timers) >= self._limits.max_unattached_streams:
            for other in [other for other in self._timers if other.is_attached]:
                self.remove(other)
        if len(self._timers) >= self._limits.max_unattached_streams:
            oldest = next(iter(self._timers))
            self._end(oldest, f"{len(self._timers)} other streams", "max_unattached_streams")
        seconds = self._limits.attach_seconds
        self._timers[stream] = asyncio.get_running_loop().call_later(
            seconds, self._end, stream, f"{seconds:g} s", "attach_seconds"
        )

    def remove(self, stream: Stream) -> None:
        """Forget a stream that has attached or ended; nothing happens if it was forgotten."""
        if timer := self._timers.pop(stream, None):
            timer.cancel()

    def _end(self, stream: Stream, waited: str, name: str) -> None:
        self.remove(stream)
        if not stream.is_attached:
            reason = f"the stream has sent no attach, after {waited} ({option(name)})"
            stream.outbox.put(StreamEnd(grpc.StatusCode.RESOURCE_EXHAUSTED, reason))
