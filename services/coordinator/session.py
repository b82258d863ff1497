"""One rank's stream: its messages change the run, and the run's decisions go to all its streams.

Every report passes through this module. Therefore a decision is serialized once, and the same
bytes go to all streams of the run.

A rank whose stream has broken opens another one. It learns which step it must report next, and
gets the decisions that it may have missed. What still arrives on the old stream is ignored.

A stream that is too fast, or whose rank is too far ahead of the others, is read more slowly.

Not covered: tokens (`security.py`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import grpc

from switokd.distillation.decision import NOTHING, Decision
from switokd.distillation.overrides import Command, Stamped
from switokd.services.coordinator.admission import parsed
from switokd.services.coordinator.bucket import TokenBucket
from switokd.services.coordinator.histogram import Histogram
from switokd.services.coordinator.limits import Limits, exceeded
from switokd.services.coordinator.measurements import (
    host_of,
    measured_from_wire,
    network_of,
    run_measured_from_wire,
    used_from_wire,
)
from switokd.services.coordinator.messages import (
    heartbeat_from_wire,
    serialized_command,
    status_code,
)
from switokd.services.coordinator.outbox import Outbox, StreamEnd
from switokd.services.coordinator.plan import LAST_STEP
from switokd.services.coordinator.ranks import Caller
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.report_checks import check_scales
from switokd.services.coordinator.run_entry import RunEntry
from switokd.services.coordinator.run_metrics import RankSeries
from switokd.services.coordinator.text import sentence
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import (
    MODE_FROM_WIRE,
    command_from_wire,
    decision_from_wire,
    decision_to_wire,
    modes_from_wire,
    sums_from_wire,
)

WAIT_SECONDS = 0.02
"""How often it is looked whether a rank that is ahead may go on."""

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Attachment:
    """The run and the rank of a stream, with what is measured of the rank."""

    entry: RunEntry
    rank: int
    decision_waits: tuple[Histogram, ...]
    """One per teacher that the rank holds."""
    measured: RankSeries


class Session:
    """One stream, from its first message to its end. `outbox` holds the responses to send."""

    def __init__(self, runs: RunRegistry) -> None:
        self.outbox = Outbox(runs.limits, self._stop_writing)
        self.is_full = asyncio.Event()
        """Set once the rank has not read for too long: it gets nothing more."""
        self._limits = runs.limits
        self._runs = runs
        self._attachment: Attachment | None = None

    async def read(self, context: Context) -> None:
        """Handle the rank's messages until its stream ends; then end this side as well."""
        bucket = TokenBucket(self._limits.message_rate, self._limits.message_burst)
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                if seconds := bucket.take(len(data)):
                    await asyncio.sleep(seconds)
                self.receive(data)
                while self._must_wait:
                    await asyncio.sleep(WAIT_SECONDS)
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
            if entry.run.ended_at is None:
                entry.history.note("lost", "", rank)
            entry.check(self._runs.now())
        else:
            entry.announce_failure()

    @property
    def is_attached(self) -> bool:
        """Whether the stream has sent its attach."""
        return self._attachment is not None

    @property
    def _must_wait(self) -> bool:
        attached = self._attachment
        return (
            attached is not None
            and attached.entry.run.must_wait(attached.rank)
            and not self._is_replaced
        )

    def _stop_writing(self) -> None:
        self.is_full.set()

    @property
    def _is_replaced(self) -> bool:
        attached = self._attachment
        return attached is not None and not attached.entry.streams.is_open(
            attached.rank, self.outbox
        )

    def receive(self, data: bytes) -> None:
        """Handle one message of the rank, as it is sent."""
        try:
            if (size := len(data)) > self._limits.max_report_bytes:
                what = f"a message of {size} bytes on a stream"
                raise exceeded(what, "max_report_bytes", self._limits.max_report_bytes)
            message = parsed(pb.TrainRequest, data)
        except Refusal as refusal:
            self._refuse(refusal)
        else:
            self.handle(message)

    def handle(self, message: pb.TrainRequest) -> None:
        """Handle one message of the rank; a refusal ends the stream."""
        try:
            if not self._is_replaced:
                self._handle(message)
        except Refusal as refusal:
            self._refuse(refusal)

    def _refuse(self, refusal: Refusal) -> None:
        reason = sentence(str(refusal))
        if (attachment := self._attachment) and not self._is_replaced:
            attachment.entry.run.leave(attachment.rank, reason, self._runs.now())
        self.outbox.put(StreamEnd(status_code(refusal), reason))

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
            if message.heartbeat.HasField("usage"):
                attachment.measured.used = used_from_wire(message.heartbeat.usage)
        elif event == "settled":
            _settled(message.settled, attachment)
        elif event == "command_taken":
            _command_taken(message.command_taken, attachment, self._limits)
        elif event == "progress":
            _progress(message.progress, attachment)
        elif event == "stall":
            doing = sentence(message.stall.doing, self._limits.max_sentence_length)
            attachment.entry.run.stall(attachment.rank, doing, self._runs.now())
            attachment.entry.check(self._runs.now())
        elif event == "leave":
            run = attachment.entry.run
            failure = sentence(message.leave.failure, self._limits.max_sentence_length)
            run.leave(attachment.rank, failure, self._runs.now(), message.leave.stopped)
            if run.state.has_left:
                attachment.entry.note_end()
            self.outbox.put(StreamEnd(grpc.StatusCode.OK))
        else:
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a message without an event")

    def _attach(self, message: pb.Attach) -> None:
        entry, rank = self._runs.find(message.run_id), message.rank
        self._limits.check_name("the client", message.client)
        entry.secret.check(message.secret, message.run_id)
        if message.epoch != entry.run.epoch:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"start {message.epoch} of run {message.run_id!r} is over: start "
                f"{entry.run.epoch} has taken over",
            )
        caller = Caller(message.client, message.attempt)
        needs = entry.run.attach(rank, caller, _settled_step(message), _received(message))
        teachers = dict.fromkeys(pair.teacher for pair in entry.run.plan.pairs_of[rank])
        self._attachment = Attachment(
            entry,
            rank,
            tuple(map(entry.metrics.decision_wait, teachers)),
            entry.metrics.rank(rank),
        )
        self._attachment.measured.host = host_of(message)
        self._attachment.measured.reconnects += message.attempt > 1
        entry.streams.add(rank, self.outbox)
        entry.history.note("connected", "", rank)
        attached = pb.Attached(
            next_step=needs.next_step,
            missing=[pb.Steps(first=first, last=last) for first, last in needs.missing],
            has_journal=entry.journal.keeps,
        )
        self.outbox.put(pb.TrainResponse(attached=attached).SerializeToString())
        recorded = self._runs.recorded(entry.run)
        for decision in needs.decisions:
            self.outbox.put(_serialized(decision, recorded))
        for command in entry.run.commands.waiting if rank == 0 else ():
            self.outbox.put(serialized_command(command))

    def _report(self, message: pb.Report, attachment: Attachment) -> None:
        entry, rank, now = attachment.entry, attachment.rank, self._runs.now()
        run = entry.run
        settled = run.settled  # steps may have been settled since this stream was opened
        run.acknowledge(rank, _settled_step(message), _received(message))
        if run.settled > settled:
            entry.journal.settle(run.run_id, run.epoch, run.settled)
        sums, (modes, in_force) = sums_from_wire(message), modes_from_wire(message)
        if in_force is not NOTHING:
            check_scales(run.describe(rank), in_force)
        if decided := run.report(rank, message.step, sums, now, modes, in_force):
            recorded = self._runs.recorded(run)
            entry.streams.send(_serialized(decided.decision, recorded))
            entry.add(decided.decision, decided.duration, run.was_alone(message.step))
            self._runs.round_spans.add(run.run_id, run.epoch, decided)
        if message.previous_decided_alone and run.note_alone(message.step - 1):
            entry.journal.mark_alone(run.run_id, message.step - 1)
        _measure(message, attachment)


def _settled(message: pb.Settled, attachment: Attachment) -> None:
    """Take over a step of rank 0's record that this coordinator has not decided."""
    entry, rank = attachment.entry, attachment.rank
    if any(p.mode not in MODE_FROM_WIRE for p in message.decision.pairs):
        raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a settled step has a pair without a mode")
    if rank != 0:
        raise Refusal(
            Refusal.Kind.INVALID_ARGUMENT,
            f"{entry.run.describe(rank)} sends a settled step, which only rank 0 may",
        )
    decision = decision_from_wire(message.decision)
    if entry.run.add_settled(decision):
        if message.alone:
            entry.run.note_alone(decision.step)
        entry.add(decision, math.nan, message.alone)


def _command_taken(message: pb.CommandTaken, attachment: Attachment, limits: Limits) -> None:
    """Note that the ranks have taken a command, which this coordinator may have forgotten."""
    if attachment.rank != 0:
        raise Refusal(
            Refusal.Kind.INVALID_ARGUMENT, "only rank 0 may say what the ranks have taken"
        )
    command: Command | None
    try:
        command = command_from_wire(message.command)
    except ValueError:  # rank 0 does not know the action
        command = attachment.entry.run.commands.find(message.command_id)
    if command is not None:
        failure = sentence(message.failure, limits.max_sentence_length)
        attachment.entry.answer(Stamped(command, message.first_step, time.time(), failure))


def _settled_step(message: pb.Attach | pb.Report) -> int:
    """Return the last step in rank 0's record; Refusal if no run has so many."""
    if message.settled_step > LAST_STEP:
        raise Refusal(
            Refusal.Kind.INVALID_ARGUMENT,
            f"settled_step is {message.settled_step}; allowed: 0 to {LAST_STEP}",
        )
    return message.settled_step


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
        attachment.measured.exchange.observe(message.exchange_seconds)


def _progress(message: pb.Progress, attachment: Attachment) -> None:
    entry, plan, rank = attachment.entry, attachment.entry.run.plan, attachment.rank
    network = network_of(message, plan, rank)
    entry.metrics.network(network).add(measured_from_wire(message, plan, rank))
    if rank == 0 and message.HasField("run"):
        saved_before = entry.metrics.measured.checkpoints
        entry.metrics.measured = run_measured_from_wire(message.run)
        if (
            entry.metrics.measured.checkpoints > saved_before
        ):  # progress comes twice a second at most
            entry.history.note("checkpoint", f"saved by step {message.step}")
    entry.history.measure(
        network,
        message.step,
        message.loss if message.HasField("loss") else None,
        message.accuracy if message.HasField("accuracy") else None,
        message.test_accuracy if message.HasField("test_accuracy") else None,
    )
