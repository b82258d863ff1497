"""A rank's line to the coordinator.

One stream for the whole run: reports go out without waiting, decisions come in on a thread of
their own. When the stream ends early, `failure` says why in a sentence.

Not covered yet: reconnecting, and deciding alone when the coordinator is lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue

import grpc

from switokd.config import Config
from switokd.decision import Decision
from switokd.errors import CoordinatorError, PeerError, SwitokdError
from switokd.gap import PairSums
from switokd.placement import Placement
from switokd.topology import Pair
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from switokd.wire import ROLE_TO_WIRE, decision_from_wire, sums_to_wire

CHANNEL_OPTIONS = [
    # A coordinator whose machine vanishes closes nothing: ask, and notice within about 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Loopback and cluster addresses only; a proxy variable meant for the web must not catch them.
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True)
class Endpoint:
    """Where a coordinator listens. `http` and `pid` are None unless rank 0 started it."""

    grpc: str
    http: str | None = None
    pid: int | None = None

    def __str__(self) -> str:
        return self.grpc if self.pid is None else f"{self.grpc} (process {self.pid})"


@dataclass(frozen=True)
class Seat:
    """Where a rank reports, and as which rank of which run."""

    coordinator: Endpoint
    run_id: str
    rank: int


class Client:
    """One rank's stream. CoordinatorError from every method once the stream has failed."""

    def __init__(
        self,
        seat: Seat,
        config: Config,
        placement: Placement,
        on_decision: Callable[[Decision], None] = lambda decision: None,
        on_failure: Callable[[SwitokdError], None] = lambda error: None,
    ) -> None:
        """Join the run and attach the stream.

        `on_decision` and `on_failure` are called on the stream's thread. CoordinatorError if
        nobody answers at the address in time or the coordinator refuses this rank.
        """
        self.seat = seat
        self._timeout = config.coordinator.timeout
        self._on_decision, self._on_failure = on_decision, on_failure
        self._outgoing: SimpleQueue[pb.TrainRequest | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._last: Decision | None = None
        self._leaving = False
        self._step = 0
        self._wait: float | None = None
        self.failure: SwitokdError | None = None

        self._channel = grpc.insecure_channel(seat.coordinator.grpc, options=CHANNEL_OPTIONS)
        stub = pb_grpc.CoordinatorServiceStub(self._channel)
        join = pb.JoinRequest(run_id=seat.run_id, rank=seat.rank, plan=_plan(config, placement))
        try:
            stub.Join(join, timeout=self._timeout, wait_for_ready=True)
        except grpc.RpcError as error:
            raise self._in_words(error) from None
        self._outgoing.put(pb.TrainRequest(attach=pb.Attach(run_id=seat.run_id, rank=seat.rank)))
        self._call = stub.Train(self._requests())
        self._thread = threading.Thread(target=self._receive, daemon=True, name="decisions")
        self._thread.start()

    def report(self, step: int, pairs: Mapping[Pair, PairSums]) -> None:
        """Send this rank's part of a step; does not wait."""
        self._raise_if_failed()
        self._step = step
        message = pb.Report(step=step, pairs=sums_to_wire(pairs), decision_wait_seconds=self._wait)
        self._wait = None
        self._outgoing.put(pb.TrainRequest(report=message))

    def decision(self, step: int) -> Decision:
        """Wait for the decision of `step`, the newest that this rank has reported."""
        started = time.perf_counter()
        with self._changed:
            in_time = self._changed.wait_for(
                lambda: self.failure or (self._last and self._last.step >= step), self._timeout
            )
        self._raise_if_failed()
        if not in_time:
            raise CoordinatorError(
                f"the coordinator at {self.seat.coordinator} did not decide step {step} within "
                f"{self._timeout:g} s (coordinator.timeout)"
            )
        assert self._last is not None
        assert self._last.step == step, "decisions come in order, one per reported step"
        self._wait = time.perf_counter() - started
        return self._last

    def progress(
        self,
        samples: int,
        loss: float | None = None,
        accuracy: float | None = None,
        test_accuracy: float | None = None,
    ) -> None:
        """Send numbers for the metrics (accuracies from 0 to 1); does not wait."""
        message = pb.Progress(
            step=self._step,
            samples=samples,
            loss=loss,
            accuracy=accuracy,
            test_accuracy=test_accuracy,
        )
        self._outgoing.put(pb.TrainRequest(progress=message))

    def why(self, doing: str = "", patience: float = 3.0) -> SwitokdError | None:
        """What the coordinator knows of a failure, given `patience` seconds to learn it.

        doing: what this rank was waiting for when its collective failed.
        """
        if doing:
            self._outgoing.put(pb.TrainRequest(stall=pb.Stall(doing=doing)))
        with self._changed:
            self._changed.wait_for(lambda: self.failure, patience)
        return self.failure

    def close(self, failure: str = "") -> None:
        """Say goodbye, with a sentence if the rank has failed, and end the stream."""
        self._leaving = True
        self._outgoing.put(pb.TrainRequest(leave=pb.Leave(failure=failure)))
        self._outgoing.put(None)
        self._thread.join(timeout=2.0)
        self._channel.close()

    def _requests(self) -> Iterator[pb.TrainRequest]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _receive(self) -> None:
        """Take decisions until the stream ends."""
        try:
            for response in self._call:
                if response.WhichOneof("event") == "decision":
                    decision = decision_from_wire(response.decision)
                    with self._changed:
                        self._last = decision
                        self._changed.notify_all()
                    self._on_decision(decision)
            ended: SwitokdError = CoordinatorError(
                f"the coordinator at {self.seat.coordinator} ended the stream"
            )
        except grpc.RpcError as error:
            ended = self._in_words(error)
        except SwitokdError as error:  # the record cannot be written
            ended = error
        if self._leaving:
            return
        with self._changed:
            self.failure = ended
            self._changed.notify_all()
        self._on_failure(ended)

    def _raise_if_failed(self) -> None:
        if self.failure:
            raise self.failure

    def _in_words(self, error: grpc.RpcError) -> PeerError:
        code, details = error.code(), error.details()
        where = f"the coordinator at {self.seat.coordinator}"
        if code is grpc.StatusCode.ABORTED:  # another rank's failure, in the coordinator's words
            return PeerError(details)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and not self._step:
            return CoordinatorError(
                f"{where} does not answer within {self._timeout:g} s; is coordinator.address "
                "right, and 'switokd coordinator' running there?"
            )
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return CoordinatorError(f"{where} went away at step {self._step} ({details})")
        return CoordinatorError(f"{where} refuses this rank: {details} ({code.name})")


def _plan(config: Config, placement: Placement) -> pb.RunPlan:
    return pb.RunPlan(
        networks=[
            pb.Network(name=name, role=ROLE_TO_WIRE[role], ranks=placement.ranks_of(name))
            for name, role in config.topology.roles
        ],
        strategy=config.distillation.strategy,
        config_digest=config.digest,
        round_timeout_seconds=config.coordinator.timeout,
    )
