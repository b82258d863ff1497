"""A rank's line to the coordinator.

One stream for the whole run: reports go out without waiting, decisions come in on a thread of
their own, and are recorded on another, for a file may take longer than a step. When the stream
ends early, `failure` says why in a sentence.

A rank that foresees a decision goes on before it arrives, but never by more than a step, and
nothing that it computes is applied before the coordinator has decided the same.

Not covered yet: reconnecting, and deciding alone when the coordinator is lost (`local.py` is for
runs without one).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue

import grpc

from switokd.config.config import Config
from switokd.distillation.decision import Decision, decide_early
from switokd.distillation.distances import Parts, means
from switokd.errors import (
    CoordinatorError,
    PeerError,
    SwitokdError,
    UsageError,
)
from switokd.runtime.placement import LocalPlacement, Placement
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

LAST_SECONDS = 2.0
"""How long a rank waits at its end for the record, if it has failed, and for the stream."""


@dataclass(frozen=True)
class Endpoint:
    """Where a coordinator listens. `http` and `pid` are None unless rank 0 started it."""

    grpc: str
    http: str | None = None
    pid: int | None = None

    def __str__(self) -> str:
        return self.grpc if self.pid is None else f"{self.grpc} (process {self.pid})"


@dataclass(frozen=True)
class Membership:
    """Where a rank reports, and as which rank of which run."""

    coordinator: Endpoint
    run_id: str
    rank: int


class Client:
    """One rank's stream. CoordinatorError from every method once the stream has failed."""

    def __init__(
        self,
        membership: Membership,
        config: Config,
        placement: Placement,
        on_decision: Callable[[Decision], None] = lambda decision: None,
        on_failure: Callable[[SwitokdError], None] = lambda error: None,
    ) -> None:
        """Join the run and attach the stream.

        `on_decision` is called for each, in order, on a thread of its own that nobody waits for
        before `close`; should it fail, so does the stream. `on_failure` is called on the thread
        that has seen the failure. CoordinatorError if nobody answers at the address in time or
        the coordinator refuses this rank, UsageError if it refuses the run as such.
        """
        self.membership = membership
        self._rule = config.method.rule
        self._own = [
            p for p in config.topology.pairs if membership.rank in placement.ranks_of(p.teacher)
        ]
        lenders = [self._rule.epsilon_from.get(pair, pair) for pair in self._own]
        self.pairs = list(dict.fromkeys([*self._own, *lenders]))
        """What this rank measures: it reports its own teachers', and foresees by all of them."""
        self.waits: list[float] = []
        """Seconds that this rank stood still for each step's decision; teachers' ranks only."""
        self._place = LocalPlacement(placement, membership.rank)
        self._foreseen: Decision | None = None
        self._timeout = config.coordinator.timeout
        self._on_decision, self._on_failure = on_decision, on_failure
        self._outgoing: SimpleQueue[pb.TrainRequest | None] = SimpleQueue()
        self._decided: SimpleQueue[Decision | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._last: Decision | None = None
        self._leaving = False
        self._unrecorded: SwitokdError | None = None
        self._step = 0
        self.failure: SwitokdError | None = None

        self._channel = grpc.insecure_channel(membership.coordinator.grpc, options=CHANNEL_OPTIONS)
        stub = pb_grpc.CoordinatorServiceStub(self._channel)
        join = pb.JoinRequest(
            run_id=membership.run_id, rank=membership.rank, plan=_plan(config, placement)
        )
        try:
            stub.Join(join, timeout=self._timeout, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:  # every rank brings the same plan
                where = f"the coordinator at {membership.coordinator}"
                raise UsageError(f"{where} refuses the run: {error.details()}") from None
            raise self._describe(error) from None
        self._outgoing.put(
            pb.TrainRequest(attach=pb.Attach(run_id=membership.run_id, rank=membership.rank))
        )
        self._call = stub.Train(self._requests())
        self._receiver = threading.Thread(target=self._receive, daemon=True, name="decisions")
        self._recorder = threading.Thread(target=self._record, daemon=True, name="record")
        self._receiver.start()
        self._recorder.start()

    def report(self, step: int, parts: Parts, exchange_seconds: float | None = None) -> None:
        """Send this rank's part of a step; waits only for the step before to be decided.

        exchange_seconds: what this step's exchange took, for the metrics.
        """
        if self.pairs and step > 1:
            self.decision(step - 1)
        self._raise_if_failed()
        sums = {
            pair: parts[pair][
                self._place.placement.ranks_of(pair.teacher).index(self.membership.rank)
            ]
            for pair in self._own
        }
        waited = self.waits[-1] if self.waits else None
        message = pb.Report(
            step=step,
            pairs=sums_to_wire(sums),
            decision_wait_seconds=waited,
            exchange_seconds=exchange_seconds,
        )
        self._step = step
        if self.pairs:
            self.waits.append(0.0)
        self._outgoing.put(pb.TrainRequest(report=message))

    def decide_early(self, step: int, parts: Parts) -> Decision | None:
        """Decide this rank's own pairs, where no rounding could make the coordinator differ.

        Its decision is compared when it comes; should it differ, every later call raises.
        """
        self._foreseen = decide_early(step, means(parts), self._rule) if parts else None
        return self._foreseen

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
                f"the coordinator at {self.membership.coordinator} did not decide step {step} "
                f"within {self._timeout:g} s (coordinator.timeout)"
            )
        decision = self._last
        assert decision is not None
        if self.pairs:
            assert decision.step == step, "decisions come in order, one per reported step"
            self.waits[-1] += time.perf_counter() - started
        if self._foreseen and self._foreseen.step == step:
            for pair in self._foreseen.pairs:
                if decision.mode(pair.pair) is not pair.mode:
                    raise CoordinatorError(
                        f"the coordinator at {self.membership.coordinator} decided step {step} for "
                        f"{pair.pair.teacher} and {pair.pair.student} otherwise than its numbers "
                        "say: it is another version, or faulty"
                    )
        return decision

    def progress(
        self,
        network: str,
        samples: int,
        loss: float | None = None,
        accuracy: float | None = None,
        test_accuracy: float | None = None,
    ) -> None:
        """Send numbers for the metrics (accuracies from 0 to 1); does not wait."""
        message = pb.Progress(
            step=self._step,
            network=network,
            samples=samples,
            loss=loss,
            accuracy=accuracy,
            test_accuracy=test_accuracy,
        )
        self._outgoing.put(pb.TrainRequest(progress=message))

    def stall(self, doing: str) -> None:
        """Say that the others have kept this rank waiting for too long; does not wait."""
        self._outgoing.put(pb.TrainRequest(stall=pb.Stall(doing=doing)))

    def why(self, doing: str = "", patience: float = 3.0) -> SwitokdError | None:
        """What the coordinator knows of a failure, given `patience` seconds to learn it.

        doing: what this rank was waiting for when its collective failed.
        """
        if doing:
            self.stall(doing)
        with self._changed:
            self._changed.wait_for(lambda: self.failure, patience)
        return self.failure

    def close(self, failure: str = "") -> None:
        """Say goodbye, with a sentence if the rank has failed, and see the last decision recorded.

        UsageError if that cannot be done, unless the rank has failed anyway.
        """
        self._leaving = True
        self._decided.put(None)
        self._recorder.join(LAST_SECONDS if failure else None)
        lost, self._unrecorded = self._unrecorded, None
        self._outgoing.put(pb.TrainRequest(leave=pb.Leave(failure=failure or str(lost or ""))))
        self._outgoing.put(None)
        self._receiver.join(LAST_SECONDS)
        self._channel.close()
        if lost and not failure:
            raise lost

    def _requests(self) -> Iterator[pb.TrainRequest]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _receive(self) -> None:
        """Take decisions until the stream ends."""
        try:
            for response in self._call:
                if response.WhichOneof("event") == "decision":
                    decision = decision_from_wire(response.decision)
                    self._decided.put(decision)
                    with self._changed:
                        self._last = decision
                        self._changed.notify_all()
            ended: PeerError = CoordinatorError(
                f"the coordinator at {self.membership.coordinator} ended the stream"
            )
        except grpc.RpcError as error:
            ended = self._describe(error)
        self._fail(ended)

    def _record(self) -> None:
        """Hand on decisions until there are no more, or they cannot be kept."""
        try:
            while (decision := self._decided.get()) is not None:
                self._on_decision(decision)
        except Exception as error:  # on this thread nobody else would see it
            why = f"decisions cannot be recorded: {type(error).__name__}: {error}"
            self._unrecorded = error if isinstance(error, SwitokdError) else SwitokdError(why)
            self._fail(self._unrecorded)

    def _fail(self, why: SwitokdError) -> None:
        if self._leaving:
            return
        with self._changed:
            self.failure = self.failure or why
            self._changed.notify_all()
        self._on_failure(why)

    def _raise_if_failed(self) -> None:
        if self.failure:
            raise self.failure

    def _describe(self, error: grpc.RpcError) -> PeerError:
        code, details = error.code(), error.details()
        where = f"the coordinator at {self.membership.coordinator}"
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
        strategy_kwargs=json.dumps(config.distillation.strategy_kwargs, sort_keys=True),
        semantics=config.distillation.semantics,
        switched_off=[
            pb.Pair(teacher=pair.teacher, student=pair.student)
            for pair in sorted(config.topology.off)
        ],
        config_digest=config.digest,
        round_timeout_seconds=config.coordinator.timeout,
    )
