"""Keeps all runs of one coordinator: creates, finds, watches and forgets them.

Runs of an earlier coordinator come from its journal.

Not covered: limits on the number of runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from switokd.distillation.decision import Decision
from switokd.services.coordinator.journal import NO_JOURNAL, Journal, StoredRun
from switokd.services.coordinator.messages import notice_to_wire
from switokd.services.coordinator.metrics import Metrics, RunMetrics
from switokd.services.coordinator.outbox import RunStreams
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.run import CoordinatedRun

ASLEEP_SECONDS = 2.0
"""If the watch was not called for longer than this, the whole process was stopped."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunEntry:
    """One run with its streams and its metrics."""

    run: CoordinatedRun
    streams: RunStreams
    metrics: RunMetrics
    journal: Journal

    def check(self, now: float) -> None:
        """End the run if one of its ranks hangs or is gone."""
        if reason := self.run.hang(now):
            self.run.fail(reason, now)
        for notice in self.run.health.take_notices():
            log.warning("run %s: %s", self.run.run_id, notice.text)
            if notice.reader is not None:
                self.streams.send_to(notice.reader, notice_to_wire(notice.text))
        self.announce_failure()

    def announce_failure(self) -> None:
        """If the run has failed, log the reason and end all its streams with it, once."""
        if self.run.failure and self.streams.fail(self.run.failure):
            log.warning("run %s: %s", self.run.run_id, self.run.failure)
            self.journal.end(self.run.run_id, self.run.epoch, self.run.failure)

    def add(self, decision: Decision, duration: float, alone: bool = False) -> None:
        """Count and write down a decision. duration, alone: as for metrics and journal."""
        self.metrics.add_decision(decision, duration)
        self.journal.add(self.run.run_id, decision, alone)


class RunRegistry:
    """Runs by id.

    strategies: import strings that a plan may name. The coordinator refuses all others, because a
    plan may come from anyone who reaches its port. forget_after: seconds from a run's end until
    its status and metrics disappear. journal: holds the runs of earlier coordinators. clock:
    returns seconds.
    """

    def __init__(
        self,
        metrics: Metrics,
        strategies: Collection[str] = (),
        forget_after: float = 600.0,
        journal: Journal = NO_JOURNAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._strategies = frozenset(strategies)
        self._forget_after = forget_after
        self._entries: dict[str, RunEntry] = {}
        self._journal = journal
        self._clock = clock
        self._asleep = 0.0
        self._watched_at = clock()
        for stored in journal.stored():
            self._continue(stored)

    def _continue(self, stored: StoredRun) -> None:
        """Continue a run of the journal, unless this coordinator may not decide it."""
        plan, now = stored.plan, self.now()
        try:
            run = CoordinatedRun(stored.run_id, plan, now, self._strategies, stored.epoch)
        except Refusal as refusal:
            log.error("run %s of the journal is left out: %s", stored.run_id, refusal)
            return
        run.restore(stored.settled, stored.decisions, stored.steps, now)
        self._add(run, self._metrics.add_run(run))
        log.info("run %s: continues from the journal", run.run_id)

    def now(self) -> float:
        """Return the time in seconds, without the times at which this process was stopped.

        Otherwise all ranks would seem to have been silent for so long.
        """
        return self._clock() - self._asleep

    @property
    def open_streams(self) -> int:
        """Number of open streams of all runs."""
        return sum(len(entry.streams) for entry in self._entries.values())

    def join(
        self, run_id: str, rank: int, plan: Plan, now: float, epoch: int = 0
    ) -> CoordinatedRun:
        """Add a rank to its run, and create the run for its first rank.

        epoch: a higher one than the run's replaces the run. Refusal if no run can follow the plan,
        if the run has another plan, or if the epoch is over.
        """
        if not run_id:
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a run needs an id")
        entry = self._entries.get(run_id)
        if entry and epoch < entry.run.epoch:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{entry.run.describe(rank)} belongs to start {epoch} of run {run_id!r}, but start "
                f"{entry.run.epoch} has taken over",
            )
        is_new = entry is None or epoch > entry.run.epoch
        run = (
            CoordinatedRun(run_id, plan, now, self._strategies, epoch)
            if entry is None or is_new
            else entry.run
        )
        run.join(rank, plan)
        if is_new:
            self._replace(entry, run)
        return run

    def _replace(self, entry: RunEntry | None, run: CoordinatedRun) -> None:
        """Take in a new run, or the new epoch of a run."""
        metrics = entry.metrics if entry else self._metrics.add_run(run)
        if entry:
            entry.streams.fail(f"start {run.epoch} of run {run.run_id!r} has taken over")
            metrics.run = run
        log.info("run %s: new, %s, %d ranks", run.run_id, run.plan.topology.name, run.world_size)
        self._journal.begin(run.run_id, run.epoch, run.plan)
        self._add(run, metrics)

    def _add(self, run: CoordinatedRun, metrics: RunMetrics) -> None:
        self._entries[run.run_id] = RunEntry(run, RunStreams(), metrics, self._journal)

    def find(self, run_id: str) -> RunEntry:
        """Return a run; Refusal if there is none with this id."""
        entry = self._entries.get(run_id)
        if entry is None:
            raise Refusal(
                Refusal.Kind.NOT_FOUND,
                f"no run {run_id!r} here: it never joined, or ended and was forgotten",
            )
        return entry

    def drain(self) -> None:
        """End all streams, because this coordinator stops."""
        for entry in self._entries.values():
            entry.streams.drain()

    async def watch(self, interval: float = 0.5) -> None:
        """Check all runs every `interval` seconds, forever."""
        while True:
            await asyncio.sleep(interval)
            try:
                self.check_all()
            except Exception:  # the check must go on for the other runs
                log.exception("watching runs failed")

    def check_all(self) -> None:
        """Do what is due every half second."""
        self._note_sleep()
        self.check(self.now())

    def _note_sleep(self) -> None:
        """Take the time for which this process was stopped out of `now`."""
        now = self._clock()
        if now - self._watched_at > ASLEEP_SECONDS:
            self._asleep += now - self._watched_at
        self._watched_at = now

    def recorded(self, run: CoordinatedRun) -> int:
        """Return the last step of a run that is in the journal, on the disk; 0: none."""
        return self._journal.recorded(run.run_id, run.epoch)

    def check(self, now: float) -> None:
        """End runs whose ranks hang; forget runs that ended more than `forget_after` ago."""
        for run_id, entry in list(self._entries.items()):
            run = entry.run
            entry.check(now)
            if run.ended_at is not None and now - run.ended_at > self._forget_after:
                del self._entries[run_id]
                self._metrics.forget(run_id)
                log.info("run %s: forgotten", run_id)
