"""The gRPC service: messages in, calls on `rounds.Run`, decisions out.

A mistake ends the stream or call that made it with the fitting status and a sentence; it
touches no other run. A rank that goes away without a goodbye ends its own run.

Every report passes through here, so what is the same for many is made once: a decision is
serialised once and its bytes are sent on all streams of the run.

Not covered: TLS and authentication, a journal.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import grpc

from switokd.distillation.topology import Pair, Topology
from switokd.services.coordinator.metrics import Distribution, Metrics, RunNumbers
from switokd.services.coordinator.plan import Plan, Refusal
from switokd.services.coordinator.rounds import Phase, RunState
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import (
    ROLE_FROM_WIRE,
    ROLE_TO_WIRE,
    decision_to_wire,
    sums_from_wire,
)

SERVICE = pb.DESCRIPTOR.services_by_name["CoordinatorService"].full_name
log = logging.getLogger(__name__)

STATE_TO_WIRE = {
    Phase.JOINING: pb.RUN_STATE_JOINING,
    Phase.TRAINING: pb.RUN_STATE_TRAINING,
    Phase.FINISHED: pb.RUN_STATE_FINISHED,
    Phase.FAILED: pb.RUN_STATE_FAILED,
}


@dataclass(frozen=True)
class End:
    """Last entry of an outbox: how the stream ends. OK is a goodbye returned."""

    code: grpc.StatusCode
    sentence: str = ""


Context = grpc.aio.ServicerContext[Any, Any]

ATTACHED = pb.TrainResponse(attached=pb.Attached()).SerializeToString()


class Outbox:
    """What is to be sent on a stream: serialised responses, then how it ends.

    An asyncio.Queue with one reader would do the same at twice the cost.
    """

    def __init__(self) -> None:
        self._waiting: deque[bytes | End] = deque()
        self._wanted: asyncio.Future[None] | None = None

    def put(self, item: bytes | End) -> None:
        """Add at the end."""
        self._waiting.append(item)
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def get(self) -> bytes | End:
        """Take the first, when there is one."""
        while not self._waiting:
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted
        return self._waiting.popleft()


@dataclass
class Session:
    """One stream: what is to be sent on it and, once it has said whose it is, the rank's place."""

    outbox: Outbox
    run: RunState | None = None
    rank: int = -1
    others: dict[int, Outbox] = field(default_factory=dict)
    """Outboxes of all ranks of the run, this one's among them."""
    numbers: RunNumbers | None = None
    waits: list[Distribution] = field(default_factory=list)
    """Of each of its teachers."""
    exchanges: Distribution | None = None


class Coordinator:
    """All runs of this process. `clock` gives seconds; tests pass their own.

    strategies: import strings that runs may name. Others are refused: a run may come from anywhere.
    """

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        forget_after: float = 600.0,
        strategies: Collection[str] = (),
    ) -> None:
        self.runs: dict[str, RunState] = {}
        self._metrics = metrics
        self._clock = clock
        self._forget_after = forget_after
        self._strategies = frozenset(strategies)
        self._outboxes: dict[str, dict[int, Outbox]] = {}
        self._announced: set[str] = set()
        """Failed runs whose ranks have been told."""

    @property
    def streams(self) -> int:
        """Open streams."""
        return sum(map(len, self._outboxes.values()))

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service as the server takes it. Unlike the generated function's, it sends bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Join": grpc.unary_unary_rpc_method_handler(
                    self.Join, pb.JoinRequest.FromString, pb.JoinResponse.SerializeToString
                ),
                "Train": grpc.stream_stream_rpc_method_handler(
                    self.Train, pb.TrainRequest.FromString
                ),
                "GetRunStatus": grpc.unary_unary_rpc_method_handler(
                    self.GetRunStatus,
                    pb.GetRunStatusRequest.FromString,
                    pb.GetRunStatusResponse.SerializeToString,
                ),
            },
        )

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """See the contract."""
        try:
            if not request.run_id:
                raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a run needs an id")
            plan = _plan_from_wire(request.plan)
            run = self.runs.get(request.run_id) or RunState(
                request.run_id, plan, self._clock(), self._strategies
            )
            run.join(request.rank, plan)
        except Refusal as refusal:
            await context.abort(_code(refusal), str(refusal))
        if request.run_id not in self.runs:
            log.info("run %s: new, %s, %d ranks", run.run_id, plan.topology.name, run.world_size)
        self.runs[run.run_id] = run
        self._metrics.of(run)
        return pb.JoinResponse(joined_ranks=len(run.joined))

    async def GetRunStatus(
        self, request: pb.GetRunStatusRequest, context: Context
    ) -> pb.GetRunStatusResponse:
        """See the contract."""
        try:
            run = self._find(request.run_id)
        except Refusal as refusal:
            await context.abort(_code(refusal), str(refusal))
        return pb.GetRunStatusResponse(
            state=STATE_TO_WIRE[run.state],
            plan=_plan_to_wire(run.plan),
            connected_ranks=sorted(run.connected),
            last_decision=decision_to_wire(run.last) if run.last else None,
            failure=run.failure,
        )

    async def Train(self, _: object, context: Context) -> None:
        """See the contract."""
        session = Session(Outbox())
        reader = asyncio.create_task(self._read(context, session))
        try:
            while not isinstance(item := await session.outbox.get(), End):
                await context.write(item)
            reader.cancel()
            if item.code is not grpc.StatusCode.OK:
                await context.abort(item.code, item.sentence)
        finally:  # also when the rank is gone: then this handler is cancelled
            reader.cancel()
            self._close(session)

    async def watch(self, interval: float = 0.5) -> None:
        """End runs whose ranks hang, forget runs that ended long ago; forever."""
        while True:
            await asyncio.sleep(interval)
            try:
                self._tend(self._clock())
            except Exception:  # the watch must go on for the other runs
                log.exception("watching runs failed")

    def _tend(self, now: float) -> None:
        for run in list(self.runs.values()):
            if watchdog := run.watchdog(now):
                run.fail(watchdog, now)
                self._after_change(run)
            if run.ended_at is not None and now - run.ended_at > self._forget_after:
                del self.runs[run.run_id]
                self._announced.discard(run.run_id)
                self._metrics.forget(run.run_id)
                log.info("run %s: forgotten", run.run_id)

    async def _read(self, context: Context, session: Session) -> None:
        """Handle one stream's messages until the rank leaves."""
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self._handle(message, session)
        except Refusal as refusal:
            if session.run is not None:
                session.run.leave(session.rank, str(refusal), self._clock())
            session.outbox.put(End(_code(refusal), str(refusal)))
        except Exception as error:  # a fault of ours: say so instead of leaving the rank to wait
            log.exception("stream failed")
            session.outbox.put(End(grpc.StatusCode.INTERNAL, f"coordinator fault: {error!r}"))
        else:
            session.outbox.put(End(grpc.StatusCode.OK))

    def _handle(self, message: pb.TrainRequest, session: Session) -> None:
        event = message.WhichOneof("event")
        run = session.run
        if run is None or event == "attach":
            if run is not None or event != "attach":
                raise Refusal(
                    Refusal.Kind.INVALID_ARGUMENT,
                    f"attach must be the first message of a stream and only the first; got {event}",
                )
            self._attach(message.attach, session)
        elif event == "report":
            self._report(message.report, run, session)
        elif event == "progress":
            self._progress(message.progress, run, session.rank)
        elif event == "stall":
            run.stall(session.rank, message.stall.doing, self._clock())
        elif event == "leave":
            run.leave(session.rank, message.leave.failure, self._clock())
            session.outbox.put(End(grpc.StatusCode.OK))
        else:
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a message without an event")

    def _attach(self, message: pb.Attach, session: Session) -> None:
        run = self._find(message.run_id)
        run.attach(message.rank)
        session.run, session.rank = run, message.rank
        session.others = self._outboxes.setdefault(run.run_id, {})
        session.others[message.rank] = session.outbox
        session.numbers = self._metrics.of(run)
        session.exchanges = session.numbers.exchange(session.rank)
        teachers = dict.fromkeys(pair.teacher for pair in run.plan.pairs_of[session.rank])
        session.waits = [session.numbers.decision_wait(teacher) for teacher in teachers]
        session.outbox.put(ATTACHED)
        self._after_change(run)

    def _report(self, message: pb.Report, run: RunState, session: Session) -> None:
        decided = run.report(session.rank, message.step, sums_from_wire(message), self._clock())
        if decided:
            response = pb.TrainResponse(decision=decision_to_wire(decided.decision))
            data = response.SerializeToString()
            for outbox in session.others.values():
                outbox.put(data)
            assert session.numbers is not None
            session.numbers.decided(decided.decision, decided.duration)
        if message.HasField("decision_wait_seconds"):
            for waits in session.waits:
                waits.add(message.decision_wait_seconds)
        if session.exchanges is not None and message.HasField("exchange_seconds"):
            session.exchanges.add(message.exchange_seconds)

    def _progress(self, message: pb.Progress, run: RunState, rank: int) -> None:
        networks = run.plan.networks_of[rank]
        network = message.network or networks[0]
        if network not in run.plan.topology:  # rank 0 sends all networks' test accuracies
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"{run.who(rank)} sends the progress of {network!r}, which the run does not have",
            )
        self._metrics.of(run).progressed(
            network,
            message.samples,
            message.loss if message.HasField("loss") else None,
            message.accuracy if message.HasField("accuracy") else None,
            message.test_accuracy if message.HasField("test_accuracy") else None,
        )

    def _close(self, session: Session) -> None:
        """Give the seat up; a rank that did not say goodbye is lost, and its run with it."""
        run = session.run
        if run is None:
            return
        del session.others[session.rank]
        if not session.others:
            self._outboxes.pop(run.run_id, None)
        if session.rank in run.connected:
            run.lose(session.rank, self._clock())
        self._after_change(run)

    def _after_change(self, run: RunState) -> None:
        """If the run has failed, end its streams with the reason."""
        if run.failure and run.run_id not in self._announced:
            self._announced.add(run.run_id)
            log.warning("run %s: %s", run.run_id, run.failure)
            for outbox in self._outboxes.get(run.run_id, {}).values():
                outbox.put(End(grpc.StatusCode.ABORTED, run.failure))

    def _find(self, run_id: str) -> RunState:
        if run_id not in self.runs:
            raise Refusal(
                Refusal.Kind.NOT_FOUND,
                f"no run {run_id!r} here: it never joined, or ended and was forgotten",
            )
        return self.runs[run_id]


def _code(refusal: Refusal) -> grpc.StatusCode:
    return grpc.StatusCode[refusal.kind.name]


def _plan_from_wire(message: pb.RunPlan) -> Plan:
    unknown = [n.name for n in message.networks if n.role not in ROLE_FROM_WIRE]
    if unknown:
        raise Refusal(Refusal.Kind.INVALID_ARGUMENT, f"networks without a role: {unknown}")
    return Plan(
        topology=Topology(
            tuple((n.name, ROLE_FROM_WIRE[n.role]) for n in message.networks),
            frozenset(Pair(p.teacher, p.student) for p in message.switched_off),
        ),
        ranks=tuple(tuple(n.ranks) for n in message.networks),
        strategy=message.strategy,
        config_digest=message.config_digest,
        round_timeout=message.round_timeout_seconds,
        strategy_kwargs=message.strategy_kwargs or "{}",
        semantics=message.semantics or "paper",
    )


def _plan_to_wire(plan: Plan) -> pb.RunPlan:
    return pb.RunPlan(
        networks=[
            pb.Network(name=name, role=ROLE_TO_WIRE[role], ranks=ranks)
            for (name, role), ranks in zip(plan.topology.roles, plan.ranks, strict=True)
        ],
        strategy=plan.strategy,
        config_digest=plan.config_digest,
        round_timeout_seconds=plan.round_timeout,
        strategy_kwargs=plan.strategy_kwargs,
        semantics=plan.semantics,
        switched_off=[
            pb.Pair(teacher=p.teacher, student=p.student) for p in sorted(plan.topology.off)
        ],
    )
