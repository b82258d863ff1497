"""The gRPC service: messages in, calls on `rounds.Run`, decisions out.

A mistake ends the stream or call that made it with the fitting status and a sentence; it
touches no other run. A rank that goes away without a goodbye ends its own run.

Not covered: TLS and authentication, a journal.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.rounds import Plan, Refusal, Run, State
from switokd.topology import Topology
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from switokd.wire import ROLE_FROM_WIRE, ROLE_TO_WIRE, decision_to_wire, sums_from_wire

log = logging.getLogger(__name__)

STATE_TO_WIRE = {
    State.JOINING: pb.RUN_STATE_JOINING,
    State.TRAINING: pb.RUN_STATE_TRAINING,
    State.FINISHED: pb.RUN_STATE_FINISHED,
    State.FAILED: pb.RUN_STATE_FAILED,
}


@dataclass(frozen=True)
class End:
    """Last entry of an outbox: how the stream ends. OK is a goodbye returned."""

    code: grpc.StatusCode
    sentence: str = ""


Context = grpc.aio.ServicerContext[Any, Any]

Outbox = asyncio.Queue[pb.TrainResponse | End]


@dataclass
class Seat:
    """One stream: whose it is, once it has said so, and what is to be sent on it."""

    outbox: Outbox
    run: Run | None = None
    rank: int = -1


class Coordinator(pb_grpc.CoordinatorServiceServicer):
    """All runs of this process. `clock` gives seconds; tests pass their own."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        forget_after: float = 600.0,
    ) -> None:
        self.runs: dict[str, Run] = {}
        self._metrics = metrics
        self._clock = clock
        self._forget_after = forget_after
        self._outboxes: dict[tuple[str, int], Outbox] = {}
        self._announced: set[str] = set()
        """Failed runs whose ranks have been told."""

    @property
    def streams(self) -> int:
        """Open streams."""
        return len(self._outboxes)

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """See the contract."""
        try:
            if not request.run_id:
                raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a run needs an id")
            plan = _plan_from_wire(request.plan)
            run = self.runs.get(request.run_id) or Run(request.run_id, plan, self._clock())
            run.join(request.rank, plan)
        except Refusal as refusal:
            await context.abort(_code(refusal), str(refusal))
        if request.run_id not in self.runs:
            log.info("run %s: new, %s, %d ranks", run.run_id, plan.topology.name, run.world_size)
        self.runs[run.run_id] = run
        self._metrics.run_changed(run)
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

    async def Train(
        self, requests: AsyncIterator[pb.TrainRequest], context: Context
    ) -> AsyncIterator[pb.TrainResponse]:
        """See the contract."""
        seat = Seat(asyncio.Queue())
        reader = asyncio.create_task(self._read(requests, seat))
        try:
            while not isinstance(item := await seat.outbox.get(), End):
                yield item
            reader.cancel()
            if item.code is not grpc.StatusCode.OK:
                await context.abort(item.code, item.sentence)
        finally:  # also when the rank is gone: then this handler is cancelled
            reader.cancel()
            self._close(seat)

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
            if overdue := run.overdue(now):
                run.fail(overdue, now)
                self._after_change(run)
            if run.ended_at is not None and now - run.ended_at > self._forget_after:
                del self.runs[run.run_id]
                self._announced.discard(run.run_id)
                self._metrics.forget(run.run_id)
                log.info("run %s: forgotten", run.run_id)

    async def _read(self, requests: AsyncIterator[pb.TrainRequest], seat: Seat) -> None:
        """Handle one stream's messages until the rank leaves."""
        try:
            async for message in requests:
                self._handle(message, seat)
        except Refusal as refusal:
            if seat.run is not None:
                seat.run.leave(seat.rank, str(refusal), self._clock())
            seat.outbox.put_nowait(End(_code(refusal), str(refusal)))
        except Exception as error:  # a fault of ours: say so instead of leaving the rank to wait
            log.exception("stream failed")
            seat.outbox.put_nowait(End(grpc.StatusCode.INTERNAL, f"coordinator fault: {error!r}"))
        else:
            seat.outbox.put_nowait(End(grpc.StatusCode.OK))

    def _handle(self, message: pb.TrainRequest, seat: Seat) -> None:
        event = message.WhichOneof("event")
        if (event == "attach") != (seat.run is None):
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"attach must be the first message of a stream and only the first; got {event}",
            )
        if event == "attach":
            self._attach(message.attach, seat)
            return
        run = seat.run
        assert run is not None
        if event == "report":
            self._report(message.report, run, seat.rank)
        elif event == "progress":
            self._progress(message.progress, run, seat.rank)
        elif event == "stall":
            run.stall(seat.rank, message.stall.doing, self._clock())
        elif event == "leave":
            run.leave(seat.rank, message.leave.failure, self._clock())
            seat.outbox.put_nowait(End(grpc.StatusCode.OK))
        else:
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a message without an event")

    def _attach(self, message: pb.Attach, seat: Seat) -> None:
        run = self._find(message.run_id)
        run.attach(message.rank)
        seat.run, seat.rank = run, message.rank
        self._outboxes[run.run_id, message.rank] = seat.outbox
        seat.outbox.put_nowait(pb.TrainResponse(attached=pb.Attached()))
        self._after_change(run)

    def _report(self, message: pb.Report, run: Run, rank: int) -> None:
        decided = run.report(rank, message.step, sums_from_wire(message), self._clock())
        if decided:
            response = pb.TrainResponse(decision=decision_to_wire(decided.decision))
            for outbox in self._outboxes_of(run):
                outbox.put_nowait(response)
            # The streams send first; nobody waits for the metrics.
            asyncio.get_running_loop().call_soon(
                self._metrics.decided,
                run.run_id,
                decided.decision,
                decided.duration,
                run.plan.topology.teachers,
            )
        if message.pairs and message.HasField("decision_wait_seconds"):
            self._metrics.decision_wait.labels(run.run_id, message.pairs[0].teacher).observe(
                message.decision_wait_seconds
            )
        if message.HasField("exchange_seconds"):
            self._metrics.exchange.labels(run.run_id, run.plan.networks_of[rank][0]).observe(
                message.exchange_seconds
            )

    def _progress(self, message: pb.Progress, run: Run, rank: int) -> None:
        networks = run.plan.networks_of[rank]
        network = message.network or networks[0]
        if network not in networks:
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"{run.who(rank)} sends the progress of {network!r}, which it does not hold",
            )
        labels = (run.run_id, network)
        self._metrics.samples.labels(*labels).inc(max(message.samples, 0))
        if message.HasField("loss"):
            self._metrics.loss.labels(*labels).set(message.loss)
        if message.HasField("accuracy"):
            self._metrics.train_accuracy.labels(*labels).set(message.accuracy)
        if message.HasField("test_accuracy"):
            self._metrics.test_accuracy.labels(*labels).set(message.test_accuracy)

    def _close(self, seat: Seat) -> None:
        """Give the seat up; a rank that did not say goodbye is lost, and its run with it."""
        run = seat.run
        if run is None:
            return
        del self._outboxes[run.run_id, seat.rank]
        if seat.rank in run.connected:
            run.lose(seat.rank, self._clock())
        self._after_change(run)

    def _after_change(self, run: Run) -> None:
        """Show the run's state; if it has failed, end its streams with the reason."""
        if self.runs.get(run.run_id) is run:
            self._metrics.run_changed(run)
        if run.failure and run.run_id not in self._announced:
            self._announced.add(run.run_id)
            log.warning("run %s: %s", run.run_id, run.failure)
            for outbox in self._outboxes_of(run):
                outbox.put_nowait(End(grpc.StatusCode.ABORTED, run.failure))

    def _outboxes_of(self, run: Run) -> list[Outbox]:
        return [box for (run_id, _), box in self._outboxes.items() if run_id == run.run_id]

    def _find(self, run_id: str) -> Run:
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
        topology=Topology(tuple((n.name, ROLE_FROM_WIRE[n.role]) for n in message.networks)),
        ranks=tuple(tuple(n.ranks) for n in message.networks),
        strategy=message.strategy,
        config_digest=message.config_digest,
        round_timeout=message.round_timeout_seconds,
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
    )
