"""One rank's stream: its messages change the run, and the run's decisions go to all its streams.

Every report passes through this module. Therefore a decision is serialized once, and the same
bytes go to all streams of the run.

A rank whose stream has broken opens another one. It learns which step it must report next, and
gets the decisions that it may have missed. What still arrives on the old stream is ignored.

Not covered: authentication.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import grpc

from switokd.distillation.decision import Decision
from switokd.services.coordinator.messages import heartbeat_from_wire, status_code
from switokd.services.coordinator.metrics import Histogram
from switokd.services.coordinator.outbox import Outbox, StreamEnd
from switokd.services.coordinator.ranks import Caller
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.registry import RunEntry, RunRegistry
from switokd.services.coordinator.run import RunState
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import decision_from_wire, decision_to_wire, modes_from_wire, sums_from_wire

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Attachment:
    """The run and the rank of a stream, with the histograms of the rank's measurements."""

    entry: RunEntry
    rank: int
    decision_waits: tuple[Histogram, ...]
    """One per teacher that the rank holds."""
    exchange: Histogram


class Session:
    """One stream, from its first message to its end. `outbox` holds the responses to send."""

    def __init__(self, runs: RunRegistry) -> None:
        self.outbox = Outbox()
        self._runs = runs
        self._attachment: Attachment | None = None

    async def read(self, context: Context) -> None:
        """Handle the rank's messages until its stream ends; then end this side as well."""
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self.handle(message)
        except Exception as error:  # a bug of the coordinator: tell the rank instead of hanging
            log.exception("stream failed")
            self.outbox.put(StreamEnd(grpc.StatusCode.INTERNAL, f"coordinator fault: {error!r}"))
        else:
            self.outbox.put(StreamEnd(grpc.StatusCode.OK))

    def close(self) -> None:
        """Detach the stream. The rank is lost if it has not sent Leave before."""
        if self._attachment is None or self._is_replaced:
            return
        entry, rank = self._attachment.entry, self._attachment.rank
        entry.streams.remove(rank)
        if rank in entry.run.connected:
            entry.run.lose(rank, self._runs.now())
        entry.check(self._runs.now())

    @property
    def _is_replaced(self) -> bool:
        attached = self._attachment
        return attached is not None and not attached.entry.streams.is_open(
            attached.rank, self.outbox
        )

    def handle(self, message: pb.TrainRequest) -> None:
        """Handle one message of the rank; a refusal ends the stream."""
        try:
            if not self._is_replaced:
                self._handle(message)
        except Refusal as refusal:
            if attachment := self._attachment:
                attachment.entry.run.leave(attachment.rank, str(refusal), self._runs.now())
            self.outbox.put(StreamEnd(status_code(refusal), str(refusal)))

    def _handle(self, message: pb.TrainRequest) -> None:
        event = message.WhichOneof("event")
        attachment = self._attachment
        if attachment is None or event == "attach":
            if attachment is not None or event != "attach":
                raise Refusal(
                    Refusal.Kind.INVALID_ARGUMENT,
                    f"attach must be the first message of a stream and only the first; got {event}",
                )
            self._attach(message.attach)
        elif event == "report":
            self._report(message.report, attachment)
        elif event == "heartbeat":
            heartbeat = heartbeat_from_wire(message.heartbeat)
            attachment.entry.run.health.beat(attachment.rank, heartbeat, self._runs.now())
        elif event == "settled":
            _settled(message.settled, attachment.entry)
        elif event == "progress":
            _progress(message.progress, attachment)
        elif event == "stall":
            attachment.entry.run.stall(attachment.rank, message.stall.doing, self._runs.now())
            attachment.entry.check(self._runs.now())
        elif event == "leave":
            run = attachment.entry.run
            run.leave(attachment.rank, message.leave.failure, self._runs.now())
            if run.state is RunState.FINISHED:
                attachment.entry.journal.end(run.run_id, run.epoch, "")
            self.outbox.put(StreamEnd(grpc.StatusCode.OK))
        else:
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a message without an event")

    def _attach(self, message: pb.Attach) -> None:
        entry, rank = self._runs.find(message.run_id), message.rank
        if message.epoch != entry.run.epoch:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"start {message.epoch} of run {message.run_id!r} is over: start "
                f"{entry.run.epoch} has taken over",
            )
        caller = Caller(message.client, message.attempt)
        needs = entry.run.attach(rank, caller, message.settled_step, _received(message))
        teachers = dict.fromkeys(pair.teacher for pair in entry.run.plan.pairs_of[rank])
        self._attachment = Attachment(
            entry,
            rank,
            tuple(map(entry.metrics.decision_wait, teachers)),
            entry.metrics.exchange(rank),
        )
        entry.streams.add(rank, self.outbox)
        attached = pb.Attached(
            next_step=needs.next_step,
            missing=[pb.Steps(first=first, last=last) for first, last in needs.missing],
            has_journal=entry.journal.keeps,
        )
        self.outbox.put(pb.TrainResponse(attached=attached).SerializeToString())
        recorded = self._runs.recorded(entry.run)
        for decision in needs.decisions:
            self.outbox.put(_serialized(decision, recorded))

    def _report(self, message: pb.Report, attachment: Attachment) -> None:
        entry, rank, now = attachment.entry, attachment.rank, self._runs.now()
        run = entry.run
        if message.previous_decided_alone and run.note_alone(message.step - 1):
            entry.journal.mark_alone(run.run_id, message.step - 1)
        settled = run.settled  # steps may have been settled since this stream was opened
        run.acknowledge(rank, message.settled_step, _received(message))
        if run.settled > settled:
            entry.journal.settle(run.run_id, run.epoch, run.settled)
        sums, modes = sums_from_wire(message), modes_from_wire(message)
        if decided := run.report(rank, message.step, sums, now, modes):
            recorded = self._runs.recorded(run)
            entry.streams.send(_serialized(decided.decision, recorded))
            entry.add(decided.decision, decided.duration, run.was_alone(message.step))
        _measure(message, attachment)


def _settled(message: pb.Settled, entry: RunEntry) -> None:
    """Take over a step of rank 0's record that this coordinator has not decided."""
    decision = decision_from_wire(message.decision)
    if entry.run.add_settled(decision):
        if message.alone:
            entry.run.note_alone(decision.step)
        entry.add(decision, math.nan, message.alone)


def _received(message: pb.Attach | pb.Report) -> int | None:
    return message.received_step if message.HasField("received_step") else None


def _serialized(decision: Decision, recorded: int) -> bytes:
    message = decision_to_wire(decision)
    message.recorded_step = recorded
    return pb.TrainResponse(decision=message).SerializeToString()


def _measure(message: pb.Report, attachment: Attachment) -> None:
    if message.HasField("decision_wait_seconds"):
        for decision_wait in attachment.decision_waits:
            decision_wait.observe(message.decision_wait_seconds)
    if message.HasField("exchange_seconds"):
        attachment.exchange.observe(message.exchange_seconds)


def _progress(message: pb.Progress, attachment: Attachment) -> None:
    entry, rank = attachment.entry, attachment.rank
    network = message.network or entry.run.plan.networks_of[rank][0]
    if network not in entry.run.plan.topology:  # rank 0 sends the test accuracy of all networks
        raise Refusal(
            Refusal.Kind.INVALID_ARGUMENT,
            f"{entry.run.describe(rank)} sends the progress of {network!r}, which the run does not "
            "have",
        )
    entry.metrics.add_progress(
        network,
        message.samples,
        message.loss if message.HasField("loss") else None,
        message.accuracy if message.HasField("accuracy") else None,
        message.test_accuracy if message.HasField("test_accuracy") else None,
    )
