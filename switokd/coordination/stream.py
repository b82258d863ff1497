"""A rank's stream of messages, which outlives the connections that carry it.

Messages are sent without waiting. A thread receives the decisions, and opens a new stream whenever
one breaks. Only a refusal is final, or a loss if the run must not go on without a coordinator; then
`failure` says why.

Not covered: what is sent again after a loss (`protocol.py`); the connection (`connection.py`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import grpc

from switokd.config.sections import Coordinator
from switokd.coordination.absence import Absence
from switokd.coordination.connection import FINAL, Connection, Outgoing
from switokd.coordination.heartbeat import HeartbeatThread
from switokd.coordination.membership import Membership
from switokd.coordination.protocol import Messages, RankProtocol
from switokd.distillation.decision import Decision
from switokd.errors import CoordinatorError, PeerError, SwitokdError, UsageError, first_line
from switokd.runtime.lifecycle import print_warning
from switokd.runtime.phase import ACTIVITY
from switokd.v1 import coordinator_pb2 as pb

CLOSE_SECONDS = 2.0
"""How long a rank waits at its end for the coordinator to close the stream."""

RETURN_SECONDS = 0.5
"""How long a rank waits at its end for a lost coordinator."""

REJOIN_SECONDS = 5.0
"""Longest wait for one answer of a coordinator that was lost."""


class CoordinatorStream:
    """One rank's stream. Waiting methods raise `failure` once the stream has failed.

    settings: what to do without a coordinator, and how long to wait. on_failure: called once the
    stream has failed, on the thread that has noticed it. first_step: the step reported first. say:
    tells the user that the coordinator is lost, or back.
    """

    def __init__(
        self,
        membership: Membership,
        settings: Coordinator,
        plan: pb.RunPlan,
        on_failure: Callable[[SwitokdError], None],
        first_step: int = 1,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Join the run; errors as `Connection.join_first`."""
        self._settings = settings
        self._on_failure, self._absence = on_failure, Absence(settings, say)
        self._connection = Connection(membership, settings, plan)
        absent = self._connection.join_first(settings, say)
        self._has_joined = not absent
        if absent:
            self._absence.begin(absent)
        self._outgoing: Outgoing = SimpleQueue()
        self._receiver: threading.Thread | None = None
        self._on_decision: Callable[[Decision], None] = lambda decision: None
        self._changed = threading.Condition()
        self.protocol = RankProtocol(membership, uuid.uuid4().hex[:12], first_step)
        """For reading only."""
        self._last_decision: Decision | None = None
        self._failure: SwitokdError | None = None
        self._is_closing = False
        self._heart: HeartbeatThread | None = None

    @property
    def failure(self) -> SwitokdError | None:
        """Why the stream failed; None while it works, or may work again."""
        return self._failure

    def attach(self, on_decision: Callable[[Decision], None]) -> None:
        """Open the stream; does not wait.

        on_decision: called for every decision, in order; must not wait. Mostly on the receiving
        thread.
        """
        self._on_decision = on_decision
        self._receiver = threading.Thread(
            target=self._receive_always, daemon=True, name="decisions"
        )
        self._receiver.start()
        self._heart = HeartbeatThread(self.send, self._settings.timeout)

    def report(self, report: pb.Report) -> None:
        """Send this rank's report of a step; does not wait."""
        self.raise_if_failed()
        with self._changed:
            self._send(self.protocol.report(report))

    def send(self, request: pb.TrainRequest) -> None:
        """Send any other message; does not wait. It is lost while there is no coordinator."""
        with self._changed:
            if self.protocol.is_attached:
                self._outgoing.put(request)

    def decide_alone(self, step: int) -> None:
        """Note that this rank does not wait any longer for the decision of `step`."""
        with self._changed:
            self.protocol.decide_alone(step)

    def undecided(self, first: int, last: int) -> list[pb.Report]:
        """Return this rank's reports of these steps."""
        with self._changed:
            return self.protocol.undecided(first, last)

    def settle(self, step: int, decisions: Sequence[Decision] = ()) -> None:
        """Forget the reports up to `step`. decisions: those that rank 0 has made for all ranks."""
        with self._changed:
            new = [d for d in decisions if d.step > self.protocol.decided]
            for decision in new:
                self._on_decision(decision)
            self._send(self.protocol.settle(step, new))

    def wait(self, step: int, seconds: float) -> Decision | None:
        """Wait for the decision of `step`; return the last decision, or None if it is older."""
        with self._changed, ACTIVITY.waiting(seconds):
            self._changed.wait_for(lambda: self._failure or self._has_decided(step), seconds)
            decision = self._last_decision if self._has_decided(step) else None
        self.raise_if_failed()
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

    def close(self, failure: str, stopped: bool = False) -> None:
        """Send Leave, then close the connection. failure, stopped: as for `Client.close`."""
        if self._heart is not None:
            self._heart.stop()
        with self._changed:
            if not failure and not self._failure:
                self._changed.wait_for(lambda: self.protocol.is_attached, RETURN_SECONDS)
            self._is_closing = True
            self._outgoing.put(pb.TrainRequest(leave=pb.Leave(failure=failure, stopped=stopped)))
            self._outgoing.put(None)
        if self._receiver is not None and self.protocol.is_attached:
            self._receiver.join(CLOSE_SECONDS)
        self._connection.close()

    def _has_decided(self, step: int) -> bool:
        return self._last_decision is not None and self._last_decision.step >= step

    def _send(self, messages: Messages) -> None:
        for message in messages:
            self._outgoing.put(message)

    def _receive_always(self) -> None:
        """Receive decisions; open a new stream whenever one breaks, until a final answer."""
        while not self._failure:
            error: PeerError = CoordinatorError(f"{self._connection.coordinator} ended the stream")
            try:
                if not self._has_joined:
                    self._connection.join(REJOIN_SECONDS)
                self._has_joined = False  # the next stream begins with another Join
                self._receive()
            except grpc.RpcError as rpc_error:
                error = self._connection.explain(rpc_error, self.protocol.reported)
                if rpc_error.code() in FINAL:
                    self.fail(error)
                    return
            except UsageError as unusable:  # the rank's own files, which may be replaced
                error = self._connection.explain_unusable(unusable)
            except (ValueError, KeyError) as unreadable:  # or this rank has closed the connection
                sent = f"{self._connection.coordinator} sent a message that cannot be read"
                self.fail(CoordinatorError(f"{sent}: {first_line(unreadable)}"))
                return
            if self._is_closing:
                return
            self._lose(error)

    def _lose(self, error: SwitokdError) -> None:
        """Note that the stream has broken; it is a failure if the run needs the coordinator."""
        if self._absence.begin(str(error), self._connection.is_refused):
            self.fail(error)
        with self._changed:
            self.protocol.lose()
        time.sleep(self._connection.pause)

    def _receive(self) -> None:
        """Open a stream and receive decisions until it ends."""
        outgoing: Outgoing = SimpleQueue()
        with self._changed:
            if self._is_closing:
                return
            self._outgoing.put(None)  # ends the thread that sends on the old stream
            self._outgoing = outgoing
            self._send(self.protocol.attach())
            attempt = self.protocol.attempt
        stream = self._connection.open(outgoing)
        for response in stream:
            if not self._handle(response, attempt):
                stream.cancel()
                return

    def _handle(self, response: pb.TrainResponse, attempt: int) -> bool:
        """Handle one message; return whether the stream can go on."""
        if response.WhichOneof("event") == "notice":
            print_warning(response.notice.text)
            return True
        with self._changed:
            received = self.protocol.receive(response, attempt)
            self._send(received.messages)
            for decision in received.decisions:
                self._on_decision(decision)
                self._last_decision = decision
            if self.protocol.is_attached:
                self._absence.end(self._connection.coordinator)
            self._changed.notify_all()
        return not received.is_broken
