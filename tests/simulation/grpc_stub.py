"""A rank's end of its connection: what `switokd.coordination.connection` uses of gRPC.

Not covered: TLS, tokens, keepalive, sizes of messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc

from switokd.coordination.connection import look_why
from switokd.coordination.credentials import Metadata
from switokd.services.coordinator.messages import plan_from_wire, status_code
from switokd.services.coordinator.outbox import StreamEnd
from switokd.services.coordinator.refusal import Refusal
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.simulation.clock import Clock
from tests.simulation.network import Stream
from tests.simulation.threads import SimpleQueue

if TYPE_CHECKING:
    from tests.simulation.ranks import Rank

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def replacements(clock: Clock) -> dict[Any, Any]:
    """What stands for gRPC in the simulated code. The running process is a `Rank`."""
    names = {name: getattr(grpc, name) for name in ("RpcError", "StatusCode", "FutureTimeoutError")}

    def insecure_channel(_: str, options: object = None) -> Channel:
        assert clock.current is not None
        rank: Any = clock.current.process
        return Channel(rank)

    return {
        look_why: lambda credentials: None,
        grpc: SimpleNamespace(**names, insecure_channel=insecure_channel),
        pb_grpc: SimpleNamespace(CoordinatorServiceStub=Stub),
    }


class CallError(grpc.RpcError):
    """A call that has failed."""

    def __init__(self, end: StreamEnd) -> None:
        super().__init__(end.details)
        self._end = end

    def code(self) -> grpc.StatusCode:
        return self._end.code

    def details(self) -> str:
        return self._end.details


class Channel:
    """A rank's connection."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.is_closed = rank, False

    def close(self) -> None:
        self.is_closed = True
        if stream := self.rank.stream:
            stream.breaks(grpc.StatusCode.CANCELLED)

    def check(self) -> None:
        if self.is_closed:
            raise ValueError("Cannot invoke RPC on closed channel!")


class Stub:
    """The service's methods. Join has a method `future` as well."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.Join = Join(channel)

    def Train(self, requests: Iterator[pb.TrainRequest], metadata: Metadata) -> Call:
        self._channel.check()
        return Call(self._channel.rank, requests)


class Join:
    """Adds a rank to its run."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __call__(
        self, request: pb.JoinRequest, timeout: float, wait_for_ready: bool, metadata: Metadata
    ) -> None:
        self.future(request, timeout, wait_for_ready, metadata).result()

    def future(
        self, request: pb.JoinRequest, timeout: float, wait_for_ready: bool, metadata: Metadata
    ) -> Joining:
        self._channel.check()
        assert wait_for_ready
        return Joining(self._channel.rank, request, timeout)


class Joining:
    """A Join that waits for the coordinator, then for its answer."""

    def __init__(self, rank: Rank, request: pb.JoinRequest, timeout: float) -> None:
        self._rank, self._request = rank, request
        self._end = rank.clock.now + timeout

    def cancel(self) -> None:
        """Do nothing: a call that has ended cannot be cancelled, and no other one is."""

    def result(self, timeout: float | None = None) -> None:
        """grpc.FutureTimeoutError if there is no answer in time."""
        rank = self._rank
        clock, left = rank.clock, self._end - rank.clock.now
        seconds = left if timeout is None else min(left, timeout)
        if not clock.wait_for(rank.can_connect, seconds, clock.rng.uniform(0.05, 0.5)):
            if clock.now < self._end:
                raise grpc.FutureTimeoutError
            raise CallError(StreamEnd(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer"))
        server = rank.world.server
        clock.wait(clock.rng.uniform(1e-4, 3e-3), hurries=False)
        if not server.is_answering:
            raise CallError(StreamEnd(UNAVAILABLE, "broken before the coordinator has joined it"))
        plan = plan_from_wire(self._request.plan)
        run_id, number, epoch = self._request.run_id, self._request.rank, self._request.epoch
        try:
            server.runs.join(run_id, number, plan, server.runs.now(), epoch, self._request.secret)
        except Refusal as refusal:
            raise CallError(StreamEnd(status_code(refusal), str(refusal))) from None
        finally:
            server.when_running(lambda: None)
        clock.wait(clock.rng.uniform(1e-4, 3e-3), hurries=False)
        if not rank.can_connect():
            raise CallError(StreamEnd(UNAVAILABLE, "broken before the answer"))


class Call:
    """A stream, as a call of gRPC: iterates over the coordinator's messages."""

    def __init__(self, rank: Rank, requests: Iterator[pb.TrainRequest]) -> None:
        self._rank, self._requests = rank, requests
        self._arrived = SimpleQueue(rank.clock, switches=0.0)  # the network fills it
        self._stream: Stream | None = None
        if not rank.can_connect():
            self._arrived.put(StreamEnd(UNAVAILABLE, "no connection"))
            return
        self._stream = rank.stream = Stream(
            rank.world.server, rank.clock.rng, self._arrive, self._arrived.put
        )
        rank.clock.start(self._send, rank)

    def __iter__(self) -> Iterator[pb.TrainResponse]:
        while not isinstance(item := self._arrived.get(), StreamEnd):
            yield item
        if item.code is not grpc.StatusCode.OK:
            raise CallError(item)

    def cancel(self) -> None:
        if self._stream:
            self._stream.breaks(grpc.StatusCode.CANCELLED)

    def _arrive(self, response: pb.TrainResponse) -> None:
        self._rank.hear(response)
        self._arrived.put(response)

    def _send(self) -> None:
        """Send what the rank gives; what it gives after the end is lost."""
        assert self._stream is not None
        for message in self._requests:
            if not self._stream.is_open:
                return
            self._rank.check_message(message)
            self._stream.send(message)
