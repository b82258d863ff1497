"""The gRPC connection of one rank: its calls, and what their errors mean.

The connection is made again by itself, with pauses of 50 ms to half a second.

Not covered: TLS, credentials.
"""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import grpc

from switokd.coordination.membership import Membership
from switokd.errors import CoordinatorError, PeerError, UsageError
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc

CHANNEL_OPTIONS = [
    # A coordinator whose machine vanishes closes no connection. Pings detect this within 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A coordinator that starts again is found within half a second.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # the longest wait for one attempt
    # The address is on loopback or in the cluster: a proxy for the web must not be used.
    ("grpc.enable_http_proxy", 0),
]

FINAL = (
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
)
"""Answers that another attempt would not change."""

Stream = Any
"""A gRPC call: iterates over TrainResponse messages, and has a method `cancel`."""

Outgoing = SimpleQueue["pb.TrainRequest | None"]
"""Messages of one stream; None ends it."""


class Connection:
    """A rank's calls to its coordinator. plan: sent with every Join."""

    def __init__(self, membership: Membership, plan: pb.RunPlan) -> None:
        self.coordinator = f"the coordinator at {membership.coordinator}"
        self._request = pb.JoinRequest(
            run_id=membership.run_id, rank=membership.rank, epoch=membership.epoch, plan=plan
        )
        self._channel = grpc.insecure_channel(membership.coordinator.grpc, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.CoordinatorServiceStub(self._channel)

    def join(self, seconds: float) -> None:
        """Add the rank to its run, waiting for the coordinator; grpc.RpcError if that fails."""
        self._stub.Join(self._request, timeout=seconds, wait_for_ready=True)

    def join_first(self, seconds: float) -> None:
        """Add the rank to its run for the first time.

        UsageError if the coordinator refuses the plan. CoordinatorError if it refuses this rank or
        does not answer in time.
        """
        try:
            self.join(seconds)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:  # every rank sends the same plan
                reason = f"{self.coordinator} refuses the run: {error.details()}"
                raise UsageError(reason) from None
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise CoordinatorError(
                    f"{self.coordinator} does not answer within {seconds:g} s; is "
                    "coordinator.address right, and 'switokd coordinator' running there?"
                ) from None
            raise self.explain(error, 0) from None

    def open(self, outgoing: Outgoing) -> Stream:
        """Open a stream that sends the messages of a queue; return the coordinator's messages."""
        return self._stub.Train(_messages(outgoing))

    def close(self) -> None:
        """Close the connection and all its streams."""
        self._channel.close()

    def explain(self, error: grpc.RpcError, step: int) -> PeerError:
        """Explain an error in one sentence. step: the last one that the rank has reported."""
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.ABORTED:  # the coordinator describes another rank's failure
            return PeerError(details)
        if code in FINAL:
            reason = f"{details} ({code.name})"
            return CoordinatorError(f"{self.coordinator} refuses this rank: {reason}")
        return CoordinatorError(f"{self.coordinator} went away at step {step} ({details})")


def _messages(outgoing: Outgoing) -> Iterator[pb.TrainRequest]:
    while (message := outgoing.get()) is not None:
        yield message
