"""Streams between a rank and the coordinator that delay, double and lose messages.

A stream keeps the order of its messages. When it breaks, each side has got a first part of what
the other one has sent; the coordinator notices it later than the rank.

Not covered: the rank's end of them (`grpc_stub.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import grpc

from switokd.services.coordinator.outbox import StreamEnd
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.session import Session
from switokd.v1 import coordinator_pb2 as pb
from tests.simulation.clock import Clock


class Server:
    """One process of the coordinator, and the streams that it serves."""

    def __init__(self, runs: RunRegistry, clock: Clock) -> None:
        self.runs, self.clock = runs, clock
        self.is_running = True
        self.frozen_until = 0.0
        self.streams: list[Stream] = []

    @property
    def is_answering(self) -> bool:
        return self.is_running and self.clock.now >= self.frozen_until

    def when_running(self, call: Callable[[], None]) -> None:
        """Call now, or when this process is no longer frozen; never if it is dead by then."""
        if self.clock.now < self.frozen_until:
            self.clock.at(self.frozen_until - self.clock.now, lambda: self.when_running(call))
        elif self.is_running:
            call()
            for stream in list(self.streams):
                stream.send_responses()

    def watch(self) -> None:
        """Do what `RunRegistry.watch` does in every half second."""
        if self.is_running:
            self.when_running(self.runs.check_all)
            self.clock.at(0.5, self.watch)

    def crash(self) -> None:
        self.is_running = False
        for stream in self.streams:
            self.clock.at(0.01, stream.breaks)


class Stream:
    """One stream. on_response: gets what arrives at the rank; on_end: gets the status once."""

    def __init__(
        self,
        server: Server,
        rng: random.Random,
        on_response: Callable[[pb.TrainResponse], None],
        on_end: Callable[[StreamEnd], None],
    ) -> None:
        self._server, self._clock, self._rng = server, server.clock, rng
        self._session = Session(server.runs)
        self._on_response, self._on_end = on_response, on_end
        self._last_up = self._last_down = 0.0
        self.slowness, self.doubles = 1.0, 0
        self.is_open, self._is_cut = True, False
        server.streams.append(self)

    def send(self, message: pb.TrainRequest) -> None:
        """Send a message to the coordinator, which gets it later, if at all."""
        copy = pb.TrainRequest.FromString(message.SerializeToString())
        times = 1
        if self.doubles and message.WhichOneof("event") in ("report", "settled"):
            self.doubles -= 1
            times = 2
        for _ in range(times):
            self._last_up = max(self._last_up, self._clock.now + self._delay())
            delay = self._last_up - self._clock.now
            self._clock.at(delay, lambda: self._server.when_running(lambda: self._deliver(copy)))

    def send_responses(self) -> None:
        """Send what the session has put into its outbox."""
        items = self._session.outbox._items
        while items:
            item = items.popleft()
            self._last_down = max(self._last_down, self._clock.now + self._delay())
            self._clock.at(self._last_down - self._clock.now, partial(self._arrive, item))

    def breaks(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        """Break at once for the rank; for the coordinator some time later."""
        if self.is_open:
            self.is_open = False
            self._on_end(StreamEnd(code, "broken"))
            delay = self._rng.choice((0.0, 0.01, 0.3, 2.0))
            self._clock.at(delay, lambda: self._server.when_running(self._close))

    def _delay(self) -> float:
        return self.slowness * self._rng.uniform(1e-4, 3e-3)

    def _deliver(self, message: pb.TrainRequest) -> None:
        # A message may still arrive after the rank has given the stream up.
        if not self.is_open and self._rng.random() < 0.3:
            self._is_cut = True  # this one is lost, and so are all after it
        if self in self._server.streams and not self._is_cut:
            self._session.handle(message)

    def _close(self) -> None:
        if self in self._server.streams:
            self._server.streams.remove(self)
            self._session.close()

    def _arrive(self, item: bytes | StreamEnd) -> None:
        if not self.is_open:
            return
        if isinstance(item, StreamEnd):
            self.is_open = False
            self._close()
            self._on_end(item)
        else:
            self._on_response(pb.TrainResponse.FromString(item))
