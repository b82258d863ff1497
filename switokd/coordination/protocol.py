"""One rank's side of the protocol with the coordinator, without a connection, clock or thread.

The rank keeps every report until the step is *settled*: in the record of rank 0. So a coordinator
that has lost everything learns from the ranks where the run stands. A stream may break at any
message. The next one begins with what the rank has; the coordinator answers with the step that it
needs, and sends the decisions that the rank lacks.

Each method that returns messages returns those to send now, in this order, on the open stream.

Not covered: the connection (`stream.py`); what a rank decides (`client.py`).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import NamedTuple

from switokd.coordination.membership import Membership
from switokd.distillation.decision import Decision
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import decision_from_wire, decision_to_wire

Messages = list[pb.TrainRequest]


class Received(NamedTuple):
    """What a message of the coordinator leads to."""

    decisions: list[Decision]
    """New decisions, in the order of the steps."""
    messages: Messages
    """To send now."""
    is_broken: bool = False
    """A message is missing: open another stream."""


NOTHING = Received([], [])


class RankProtocol:
    """What one rank has reported, what was decided, and what must be sent again.

    client: identifies this process. first_step: the step that is reported first.
    """

    def __init__(self, membership: Membership, client: str, first_step: int) -> None:
        self._identity = pb.Attach(
            run_id=membership.run_id,
            rank=membership.rank,
            epoch=membership.epoch,
            secret=membership.secret,
            client=client,
            host=platform.node(),
        )
        self._outbox: dict[int, pb.Report] = {}
        self._unrecorded: dict[int, bytes] = {}
        """On rank 0: decisions, serialized, that may be missing in the coordinator's journal."""
        self._answers: dict[str, pb.CommandTaken] = {}
        """On rank 0, by id: the commands that were taken or refused."""
        self.on_command: Callable[[pb.Command], None] = lambda command: None
        """Called for every command, for some twice; must not wait."""
        self._has_journal = False
        self.attempt = 0
        """Number of streams that were opened."""
        self.is_attached = False
        """Whether the coordinator has answered on the open stream."""
        self.reported = self.decided = self.settled = first_step - 1
        """Last step that was reported; that is decided, as far as this rank knows; that is in rank
        0's record."""
        self._told = first_step - 1
        """Last settled step that the coordinator has been told on the open stream."""
        self._first_here = first_step
        """The first decision that the coordinator tells on the open stream."""
        self._last_here = first_step - 1
        """The last decision that it has told on it."""
        self.recorded = first_step - 1
        """Last step that is in the coordinator's journal, on its disk, with all before it."""
        self.is_alone = False
        """Whether this rank decides without waiting: a decision was late, and none came since."""
        self._alone_step = 0
        self._heard = first_step - 1
        """Last step of which the coordinator itself has told the decision."""

    def attach(self) -> Messages:
        """Begin a new stream."""
        self.attempt += 1
        self.is_attached = False
        attach = pb.Attach(attempt=self.attempt)
        attach.settled_step, attach.received_step = self.settled, self.decided
        self._told = self.settled
        self._first_here, self._last_here = self.decided + 1, self.decided
        attach.MergeFrom(self._identity)
        return [pb.TrainRequest(attach=attach)]

    def lose(self) -> None:
        """Note that the stream has broken."""
        self.is_attached = False

    def receive(self, response: pb.TrainResponse, attempt: int) -> Received:
        """Handle a message. attempt: the stream that it came from; an old one is ignored."""
        if attempt != self.attempt:
            return NOTHING
        event = response.WhichOneof("event")
        if event == "attached":
            return self._attached(response.attached)
        if event == "command":
            self.on_command(response.command)
        if event != "decision":
            return NOTHING
        self._heard = max(self._heard, response.decision.step)
        self._last_here = max(self._last_here, response.decision.step)
        self._note_recorded(response.decision.recorded_step)
        if response.decision.step <= self.decided:
            return NOTHING
        if response.decision.step > self.decided + 1:
            self.is_attached = False
            return Received([], [], is_broken=True)
        self.decided += 1
        if self._has_journal and self._identity.rank == 0:
            self._unrecorded[self.decided] = _settled(response.decision, alone=False)
        return Received([decision_from_wire(response.decision)], [])

    def report(self, report: pb.Report) -> Messages:
        """Report the next step. Keeps the report until the step is settled."""
        if self._heard >= self.reported:
            self.is_alone = False  # the coordinator has caught up
        self.reported = report.step
        report.settled_step, report.received_step = self.settled, self.decided
        report.previous_decided_alone = self._alone_step == report.step - 1 > 0
        self._outbox[report.step] = report
        return [pb.TrainRequest(report=report)] if self.is_attached else []

    def decide_alone(self, step: int) -> None:
        """Note that this rank does not wait any longer for the decision of `step`."""
        self.is_alone = True
        self._alone_step = step

    def answer(self, taken: pb.CommandTaken) -> pb.TrainRequest:
        """Return the message that a command was taken, or refused; each later stream has it too."""
        self._answers[taken.command_id] = taken
        return pb.TrainRequest(command_taken=taken)

    def undecided(self, first: int, last: int) -> list[pb.Report]:
        """Return this rank's reports of these steps, which rank 0 needs to decide them."""
        return [self._outbox[step] for step in range(first, last + 1)]

    def settle(self, step: int, decisions: Iterable[Decision] = ()) -> Messages:
        """Note that rank 0 has recorded all steps up to this one; forget their reports.

        decisions: on rank 0, those that it has just made for all ranks.
        """
        self._outbox = {s: report for s, report in self._outbox.items() if s > step}
        self.settled = max(self.settled, step)
        self.decided = max(self.decided, step)
        self._unrecorded.update(
            {d.step: _settled(decision_to_wire(d), alone=True) for d in decisions}
        )
        return self._tell_settled([]) if self.is_attached else []

    def _attached(self, attached: pb.Attached) -> Received:
        """Send what the coordinator lacks: settled decisions first, then reports."""
        self.is_attached = True
        self._has_journal = attached.has_journal
        messages = self._tell_settled([(steps.first, steps.last) for steps in attached.missing])
        for step, report in self._outbox.items():
            if step >= attached.next_step:
                messages.append(pb.TrainRequest(report=report))
        answers = list(self._answers.values())  # another thread may add one
        messages += [pb.TrainRequest(command_taken=taken) for taken in answers]
        return Received([], messages)

    def _tell_settled(self, missing: Iterable[tuple[int, int]]) -> Messages:
        """Return the settled decisions that the coordinator may lack; their reports are gone.

        missing: first and last steps of which it says so. It cannot say so of those that were
        settled since the stream was opened. Of these it knows what it has told on this stream.
        """
        wanted = [
            *missing,
            (self._told + 1, min(self.settled, self._first_here - 1)),
            (max(self._told, self._last_here) + 1, self.settled),
        ]
        self._told = self.settled
        return [
            _message(serialized)
            for step, serialized in self._unrecorded.items()
            if any(first <= step <= last for first, last in wanted)
        ]

    def _note_recorded(self, step: int) -> None:
        self.recorded = max(self.recorded, step)
        while self._unrecorded and (first := next(iter(self._unrecorded))) <= step:
            del self._unrecorded[first]


def _settled(decision: pb.Decision, alone: bool) -> bytes:
    return pb.Settled(decision=decision, alone=alone).SerializeToString()


def _message(serialized: bytes) -> pb.TrainRequest:
    return pb.TrainRequest(settled=pb.Settled.FromString(serialized))
