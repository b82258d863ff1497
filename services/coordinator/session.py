"""One rank's stream: its messages change the run, and the run's decisions go to all its streams.

Every report passes through this module. Therefore a decision is serialized once, and the same
bytes go to all streams of the run.

Not covered: authentication; a stream that continues an earlier one of the same rank.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import grpc

from switokd.services.coordinator.messages import status_code
from switokd.services.coordinator.metrics import Histogram
from switokd.services.coordinator.outbox import Outbox, StreamEnd
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.registry import RunEntry, RunRegistry
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import decision_to_wire, sums_from_wire

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

ATTACHED = pb.TrainResponse(attached=pb.Attached()).SerializeToString()


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
                self._handle(message)
        except Refusal as refusal:
            if attachment := self._attachment:
                attachment.entry.run.leave(attachment.rank, str(refusal), time.monotonic())
            self.outbox.put(StreamEnd(status_code(refusal), str(refusal)))
        except Exception as error:  # a bug of the coordinator: tell the rank instead of hanging
            log.exception("stream failed")
            self.outbox.put(StreamEnd(grpc.StatusCode.INTERNAL, f"coordinator fault: {error!r}"))
        else:
            self.outbox.put(StreamEnd(grpc.StatusCode.OK))

    def close(self) -> None:
        """Detach the stream. The run fails if the rank has not sent Leave before."""
        if self._attachment is None:
            return
        entry, rank = self._attachment.entry, self._attachment.rank
        entry.streams.remove(rank)
        if rank in entry.run.connected:
            entry.run.lose(rank, time.monotonic())
        entry.announce_failure()

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
            _report(message.report, attachment)
        elif event == "progress":
            _progress(message.progress, attachment)
        elif event == "stall":
            attachment.entry.run.stall(attachment.rank, message.stall.doing, time.monotonic())
        elif event == "leave":
            attachment.entry.run.leave(attachment.rank, message.leave.failure, time.monotonic())
            self.outbox.put(StreamEnd(grpc.StatusCode.OK))
        else:
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a message without an event")

    def _attach(self, message: pb.Attach) -> None:
        entry, rank = self._runs.find(message.run_id), message.rank
        entry.run.attach(rank)
        teachers = dict.fromkeys(pair.teacher for pair in entry.run.plan.pairs_of[rank])
        self._attachment = Attachment(
            entry,
            rank,
            tuple(map(entry.metrics.decision_wait, teachers)),
            entry.metrics.exchange(rank),
        )
        entry.streams.add(rank, self.outbox)
        self.outbox.put(ATTACHED)


def _report(message: pb.Report, attachment: Attachment) -> None:
    entry = attachment.entry
    decided = entry.run.report(
        attachment.rank, message.step, sums_from_wire(message), time.monotonic()
    )
    if decided:
        response = pb.TrainResponse(decision=decision_to_wire(decided.decision))
        entry.streams.send(response.SerializeToString())
        entry.metrics.add_decision(decided.decision, decided.duration)
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
