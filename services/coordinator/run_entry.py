"""One run of a coordinator with what belongs to it: streams, metrics, journal, secret.

Not covered: which runs there are (`registry.py`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial

from switokd.distillation.decision import Decision
from switokd.distillation.overrides import Action, Command, Stamped
from switokd.services.coordinator.history import RunHistory
from switokd.services.coordinator.identity import RunSecret
from switokd.services.coordinator.journal import Journal
from switokd.services.coordinator.journal_history import history_statements
from switokd.services.coordinator.messages import notice_to_wire, serialized_command
from switokd.services.coordinator.outbox import RunStreams
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.run import CoordinatedRun, RunState
from switokd.services.coordinator.run_metrics import RunMetrics
from switokd.services.coordinator.status import RunTimes, run_to_wire

KEEP_SECONDS = 30.0
"""How often what the status page shows of a run goes to the journal, before the run's end."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunEntry:
    """One run with its streams, its metrics and its secret."""

    run: CoordinatedRun
    streams: RunStreams
    metrics: RunMetrics
    journal: Journal
    times: RunTimes
    history: RunHistory
    secret: RunSecret = field(default_factory=RunSecret)

    def check(self, now: float) -> None:
        """End the run if one of its ranks hangs or is gone; write its history now and then."""
        if self.run.ended_at is None and now - self.history.kept_at > KEEP_SECONDS:
            self.history.kept_at = now
            self.keep_history()
        if reason := self.run.hang(now):
            self.run.fail(reason, now)
        for notice in self.run.health.take_notices():
            log.warning("run %s: %s", self.run.run_id, notice.text)
            self.history.note("notice", notice.text)
            if notice.reader is not None:
                self.streams.send_to(notice.reader, notice_to_wire(notice.text))
        self.announce_failure()

    def drain(self) -> None:
        """End the run's streams, because this coordinator stops."""
        if self.run.ended_at is None:
            self.keep_history()
        self.streams.drain()

    def announce_failure(self) -> None:
        """If the run has failed, log the reason and end all its streams with it, once."""
        if self.run.failure and self.streams.fail(self.run.failure):
            log.warning("run %s: %s", self.run.run_id, self.run.failure)
            self.note_end()

    def note_end(self) -> None:
        """Write down that the run has ended, with its last status."""
        run = self.run
        if run.state.has_left:  # the next start of a failed run takes what waits
            for stamped in run.commands.end("the run had ended before it took the command"):
                self.journal.add_command(run.run_id, stamped)
        self.times.ended = time.time()
        self.history.note(run.state.value, run.failure)
        recorded = self.journal.recorded(run.run_id, run.epoch)
        status = run_to_wire(run, self.metrics, self.times, recorded)
        self.journal.end(run.run_id, run.epoch, run.failure)
        self.journal.keep(run.run_id, run.epoch, status)
        self.keep_history()

    def keep_history(self) -> None:
        """Write down what the status page shows of the run, if there is a journal."""
        run = self.run
        self.journal.run_later(partial(history_statements, run.run_id, run.epoch, self.history))

    def add(self, decision: Decision, duration: float, alone: bool = False) -> None:
        """Count and write down a decision. duration, alone: as for metrics and journal."""
        self.metrics.add_decision(decision, duration)
        self.history.add(decision)
        self.journal.add(self.run.run_id, decision, alone)

    def command(self, command: Command) -> str:
        """Give the run a command, and return its id; Refusal if the run cannot obey."""
        run = self.run
        if run.ended_at is not None:
            ends = {RunState.FINISHED: "has finished", RunState.STOPPED: "was stopped"}
            how = ends.get(run.state, f"has failed: {run.failure}")
            raise Refusal(Refusal.Kind.FAILED_PRECONDITION, f"run {run.run_id!r} {how}")
        stamped, is_new = run.commands.add(command, run.last_step)
        if is_new:
            log.info("run %s: command %s: %s", run.run_id, stamped.command.id, command.describe())
            self.metrics.commands[command.action] += 1
            self.journal.add_command(run.run_id, stamped)
            self.history.note("asked", command.describe())
            self.streams.send_to(0, serialized_command(stamped.command))
        return stamped.command.id

    def answer(self, stamped: Stamped) -> None:
        """Note rank 0's answer to a command."""
        if self.run.commands.answer(stamped):
            what, outcome = stamped.command.describe(), f"from step {stamped.first_step} on"
            log.info("run %s: %s: %s", self.run.run_id, what, stamped.failure or outcome)
            self.history.note(*_taken(stamped))
            self.journal.add_command(self.run.run_id, stamped)


def _taken(stamped: Stamped) -> tuple[str, str]:
    """Return the kind and the text of the event that ranks have taken a command."""
    what = stamped.command.describe()
    if stamped.failure:
        return "refused", f"{what}: {stamped.failure}"
    if stamped.command.action in (Action.CHECKPOINT, Action.STOP):
        return "checkpoint", f"{what}: after step {stamped.first_step - 1}"
    return "command", f"{what}: from step {stamped.first_step} on"
