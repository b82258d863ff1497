"""The gRPC connection of one rank: its calls, and what their errors mean.

The connection is made again by itself, with pauses of 50 ms to half a second.

Not covered: what the rank shows (`credentials.py`); why TLS fails (`diagnosis.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import grpc

from switokd.config.sections import Coordinator
from switokd.coordination.credentials import Credentials
from switokd.coordination.membership import Membership
from switokd.coordination.probe import HINT
from switokd.coordination.tokens import TOKEN
from switokd.errors import CoordinatorError, PeerError, UsageError
from switokd.runtime.waiting import waiting
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
    grpc.StatusCode.PERMISSION_DENIED,
)
"""Answers that another attempt would not change. UNAUTHENTICATED is none of them: the rank's file
with the token may be replaced."""

MISTAKES = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)
"""Answers to the first call that the user must do something about."""

LOOK_SECONDS = 1.0
"""How long the first call waits before the rank looks why nobody answers, and until it looks again.
"""

WAITS_SECONDS = 1.5
"""How long the first answer may take until a line says who is waited for."""

ABSENT_SECONDS = 5.0
"""How long a job that starts again waits for its coordinator before its ranks decide alone."""

PAUSE_SECONDS, REFUSED_SECONDS = 0.05, 1.0
"""Pause between a stream that has broken and the next one, so that no loop is busy; and longer, if
the rank's credentials are refused."""

Stream = Any
"""A gRPC call: iterates over TrainResponse messages, and has a method `cancel`."""

Outgoing = SimpleQueue["pb.TrainRequest | None"]
"""Messages of one stream; None ends it."""


class Connection:
    """A rank's calls to its coordinator. plan: sent with every Join."""

    def __init__(self, membership: Membership, settings: Coordinator, plan: pb.RunPlan) -> None:
        """UsageError if the files of the settings cannot be read."""
        self.coordinator = f"the coordinator at {membership.coordinator}"
        self._request = pb.JoinRequest(
            run_id=membership.run_id,
            rank=membership.rank,
            epoch=membership.epoch,
            plan=plan,
            secret=membership.secret,
        )
        self.is_refused = False
        """Whether the last error that was explained is about this rank's credentials."""
        self._credentials = Credentials.of(membership.coordinator, settings)
        self._connect()

    def _connect(self) -> None:
        self._seen = self._credentials.seen()
        self._channel = self._credentials.channel(CHANNEL_OPTIONS)
        self._stub = pb_grpc.CoordinatorServiceStub(self._channel)

    def join(self, seconds: float) -> None:
        """Add the rank to its run, waiting for the coordinator; grpc.RpcError if that fails.

        With files that have been replaced, the rank makes a new connection.
        """
        if self._credentials.seen() not in ((), self._seen):
            with suppress(UsageError):  # the files are being replaced
                old = self._channel
                self._connect()
                old.close()
        metadata = self._credentials.metadata()
        self._stub.Join(self._request, timeout=seconds, wait_for_ready=True, metadata=metadata)

    def join_first(self, settings: Coordinator, say: Callable[[str], None]) -> str:
        """Add the rank to its run for the first time; return an empty text.

        If a job starts again, its coordinator may be lost. If its ranks may decide alone, the rank
        then waits less; if no answer comes, the returned text says so. say: tells the user who is
        waited for, if it takes long. UsageError if the coordinator refuses the plan, the secret or
        the token, or if certificates do not fit. CoordinatorError if it refuses this rank, or does
        not answer in time.
        """
        seconds, may_be_absent = settings.timeout, False
        if self._request.epoch > 1 and settings.on_loss == "decide_alone":
            seconds, may_be_absent = min(seconds, ABSENT_SECONDS), True
        try:
            with waiting(self.coordinator, seconds, HINT, say, WAITS_SECONDS):
                self._join_or_say_why(seconds)
        except UsageError as problem:  # of certificates or tokens, which may be replaced
            if not may_be_absent:
                raise
            return str(problem)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED and may_be_absent:
                return str(self.explain(error, 0))
            if error.code() in MISTAKES:
                reason = f"{self.coordinator} refuses the run: {error.details()}{_advice(error)}"
                # Every rank sends the same plan and the same secret, but perhaps its own token.
                is_shared = error.code() is not grpc.StatusCode.UNAUTHENTICATED
                raise UsageError(reason, every_rank=is_shared) from None
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise CoordinatorError(
                    f"what answers is not {self.coordinator} ({error.details()}); {HINT}"
                ) from None
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise self.explain(error, 0) from None
            absent = f"{self.coordinator} does not answer within {seconds:g} s"
            if not may_be_absent:
                # All ranks have waited for it at the same time.
                raise CoordinatorError(f"{absent}; {HINT}", every_rank=True) from None
            return absent
        return ""

    def _join_or_say_why(self, seconds: float) -> None:
        """Join; grpc.RpcError if that fails, UsageError if no attempt can succeed."""
        metadata = self._credentials.metadata()
        joining = self._stub.Join.future(
            self._request, timeout=seconds, wait_for_ready=True, metadata=metadata
        )
        before = ""
        try:
            while True:
                with suppress(grpc.FutureTimeoutError):
                    joining.result(LOOK_SECONDS)
                    return
                problem = look_why(self._credentials)
                if problem and str(problem) == before:  # not while a coordinator starts or stops
                    raise problem
                before = str(problem or "")
        finally:
            joining.cancel()

    def open(self, outgoing: Outgoing) -> Stream:
        """Open a stream that sends the messages of a queue; return the coordinator's messages."""
        return self._stub.Train(_messages(outgoing), metadata=self._credentials.metadata())

    @property
    def pause(self) -> float:
        """Seconds before the next attempt."""
        return REFUSED_SECONDS if self.is_refused else PAUSE_SECONDS

    def explain_unusable(self, error: UsageError) -> PeerError:
        """Explain that this rank's own files cannot be used now."""
        self.is_refused = True
        return CoordinatorError(f"{self.coordinator} cannot be asked: {error}")

    def close(self) -> None:
        """Close the connection and all its streams."""
        self._channel.close()

    def explain(self, error: grpc.RpcError, step: int) -> PeerError:
        """Explain an error in one sentence. step: the last one that the rank has reported."""
        self.is_refused = False
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.ABORTED:  # the coordinator describes another rank's failure
            return PeerError(details)
        if code in FINAL or code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            reason = f"{details} ({code.name})"
            return CoordinatorError(f"{self.coordinator} refuses this rank: {reason}")
        if code is grpc.StatusCode.UNAUTHENTICATED:
            self.is_refused = True
            return CoordinatorError(f"{self.coordinator} refuses this rank's token: {details}")
        return CoordinatorError(f"{self.coordinator} went away at step {step} ({details})")


def look_why(credentials: Credentials) -> UsageError | None:
    """Look why a coordinator does not answer; see `diagnosis.problem_with`."""
    from switokd.coordination.diagnosis import problem_with  # imports much, for rare cases

    return problem_with(credentials)


def _advice(error: grpc.RpcError) -> str:
    """Return what the user can do about a refusal that the coordinator knows nothing of."""
    if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
        return ""
    return f" (coordinator.token_file, or the environment variable {TOKEN})"


def _messages(outgoing: Outgoing) -> Iterator[pb.TrainRequest]:
    while (message := outgoing.get()) is not None:
        yield message
