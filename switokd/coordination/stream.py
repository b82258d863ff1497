"""A rank's connection to the coordinator: it joins the run, sends messages, receives decisions.

The stream stays open for the whole run. Messages are sent without waiting. A thread receives the
decisions. If the stream ends early, `failure` says why.

Not covered: TLS, credentials, reconnecting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import grpc

from switokd.coordination.membership import Membership
from switokd.distillation.decision import Decision
from switokd.errors import CoordinatorError, PeerError, SwitokdError, UsageError
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from switokd.wire import decision_from_wire

CHANNEL_OPTIONS = [
    # A coordinator whose machine vanishes closes no connection. Pings detect this within 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The address is on loopback or in the cluster: a proxy for the web must not be used.
    ("grpc.enable_http_proxy", 0),
]

CLOSE_SECONDS = 2.0
"""How long a rank waits at its end for the coordinator to close the stream."""


class CoordinatorStream:
    """One rank's stream. Waiting methods raise `failure` once the stream has failed.

    timeout: seconds to wait for the coordinator's answer to Join, and for a decision. on_failure:
    called once the stream has failed, on the thread that has noticed the failure.
    """

    def __init__(
        self, membership: Membership, timeout: float, on_failure: Callable[[SwitokdError], None]
    ) -> None:
        self._membership = membership
        self._timeout = timeout
        self._on_failure = on_failure
        self._coordinator = f"the coordinator at {membership.coordinator}"
        self._channel = grpc.insecure_channel(membership.coordinator.grpc, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.CoordinatorServiceStub(self._channel)
        self._outgoing: SimpleQueue[pb.TrainRequest | None] = SimpleQueue()
        self._receiver: threading.Thread | None = None
        self._changed = threading.Condition()
        self._last_decision: Decision | None = None
        self._failure: SwitokdError | None = None
        self._is_closing = False
        self._step = 0

    @property
    def failure(self) -> SwitokdError | None:
        """Why the stream failed; None while it works."""
        return self._failure

    @property
    def step(self) -> int:
        """Last step that this rank has reported; 0 before the first one."""
        return self._step

    def join(self, plan: pb.RunPlan) -> None:
        """Add this rank to the run.

        UsageError if the coordinator refuses the plan. CoordinatorError if it refuses this rank or
        does not answer within the timeout.
        """
        member = self._membership
        request = pb.JoinRequest(run_id=member.run_id, rank=member.rank, plan=plan)
        try:
            self._stub.Join(request, timeout=self._timeout, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:  # every rank sends the same plan
                reason = f"{self._coordinator} refuses the run: {error.details()}"
                raise UsageError(reason) from None
            raise self._error_of(error) from None

    def attach(self, on_decision: Callable[[Decision], None]) -> None:
        """Open the stream; does not wait.

        on_decision: called for every decision, in order, on the receiving thread.
        """
        member = self._membership
        attach = pb.Attach(run_id=member.run_id, rank=member.rank)
        self._outgoing.put(pb.TrainRequest(attach=attach))
        self._receiver = threading.Thread(
            target=self._receive,
            args=(self._stub.Train(self._requests()), on_decision),
            daemon=True,
            name="decisions",
        )
        self._receiver.start()

    def report(self, report: pb.Report) -> None:
        """Send this rank's report of a step; does not wait."""
        self.raise_if_failed()
        self._step = report.step
        self._outgoing.put(pb.TrainRequest(report=report))

    def send(self, request: pb.TrainRequest) -> None:
        """Send any other message; does not wait."""
        self._outgoing.put(request)

    def decision(self, step: int) -> Decision:
        """Wait for the decision of `step`, or of a later step; return the last decision."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._has_decided(step), self._timeout)
            decision = self._last_decision
        self.raise_if_failed()
        if decision is None or decision.step < step:
            raise CoordinatorError(
                f"{self._coordinator} did not decide step {step} within {self._timeout:g} s "
                "(coordinator.timeout)"
            )
        return decision

    def wait_for_failure(self, seconds: float) -> SwitokdError | None:
        """Wait for the stream to fail; return why, or None if it has not failed in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure, seconds)
        return self._failure

    def raise_if_failed(self) -> None:
        """Raise `failure` if the stream has failed."""
        if self._failure:
            raise self._failure

    def fail(self, error: SwitokdError) -> None:
        """Note a failure; the first one stays. Does nothing after `ignore_failures`."""
        if self._is_closing:
            return
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
        self._on_failure(error)

    def ignore_failures(self) -> None:
        """Treat the end of the stream as expected from now on."""
        self._is_closing = True

    def close(self, failure: str) -> None:
        """Send Leave, then close the connection. failure: why the rank failed, or empty."""
        self.ignore_failures()
        self._outgoing.put(pb.TrainRequest(leave=pb.Leave(failure=failure)))
        self._outgoing.put(None)
        if self._receiver is not None:
            self._receiver.join(CLOSE_SECONDS)
        self._channel.close()

    def _has_decided(self, step: int) -> bool:
        return self._last_decision is not None and self._last_decision.step >= step

    def _requests(self) -> Iterator[pb.TrainRequest]:
        while (request := self._outgoing.get()) is not None:
            yield request

    def _receive(
        self, responses: Iterator[pb.TrainResponse], on_decision: Callable[[Decision], None]
    ) -> None:
        """Receive decisions until the stream ends."""
        try:
            for response in responses:
                if response.WhichOneof("event") == "decision":
                    decision = decision_from_wire(response.decision)
                    on_decision(decision)
                    with self._changed:
                        self._last_decision = decision
                        self._changed.notify_all()
            error: PeerError = CoordinatorError(f"{self._coordinator} ended the stream")
        except grpc.RpcError as rpc_error:
            error = self._error_of(rpc_error)
        self.fail(error)

    def _error_of(self, error: grpc.RpcError) -> PeerError:
        """Explain a gRPC error in one sentence."""
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.ABORTED:  # the coordinator describes another rank's failure
            return PeerError(details)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and not self._step:
            return CoordinatorError(
                f"{self._coordinator} does not answer within {self._timeout:g} s; is "
                "coordinator.address right, and 'switokd coordinator' running there?"
            )
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return CoordinatorError(
                f"{self._coordinator} went away at step {self._step} ({details})"
            )
        return CoordinatorError(f"{self._coordinator} refuses this rank: {details} ({code.name})")
