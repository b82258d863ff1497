"""Keeps all runs of one coordinator: creates, finds, watches and forgets them.

Not covered: runs from before a restart of the coordinator; limits on the number of runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from switokd.services.coordinator.metrics import Metrics, RunMetrics
from switokd.services.coordinator.outbox import RunStreams
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.run import CoordinatedRun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunEntry:
    """One run with its streams and its metrics."""

    run: CoordinatedRun
    streams: RunStreams
    metrics: RunMetrics

    def announce_failure(self) -> None:
        """If the run has failed, log the reason and end all its streams with it, once."""
        if self.run.failure and self.streams.fail(self.run.failure):
            log.warning("run %s: %s", self.run.run_id, self.run.failure)


class RunRegistry:
    """Runs by id.

    strategies: import strings that a plan may name. The coordinator refuses all others, because a
    plan may come from anyone who reaches its port. forget_after: seconds from a run's end until
    its status and metrics disappear.
    """

    def __init__(
        self, metrics: Metrics, strategies: Collection[str] = (), forget_after: float = 600.0
    ) -> None:
        self._metrics = metrics
        self._strategies = frozenset(strategies)
        self._forget_after = forget_after
        self._entries: dict[str, RunEntry] = {}

    @property
    def open_streams(self) -> int:
        """Number of open streams of all runs."""
        return sum(len(entry.streams) for entry in self._entries.values())

    def join(self, run_id: str, rank: int, plan: Plan, now: float) -> CoordinatedRun:
        """Add a rank to its run, and create the run for its first rank.

        Refusal if no run can follow the plan, or if the run has another plan.
        """
        if not run_id:
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a run needs an id")
        entry = self._entries.get(run_id)
        run = entry.run if entry else CoordinatedRun(run_id, plan, now, self._strategies)
        run.join(rank, plan)
        if entry is None:
            log.info("run %s: new, %s, %d ranks", run_id, plan.topology.name, run.world_size)
            self._entries[run_id] = RunEntry(run, RunStreams(), self._metrics.add_run(run))
        return run

    def find(self, run_id: str) -> RunEntry:
        """Return a run; Refusal if there is none with this id."""
        entry = self._entries.get(run_id)
        if entry is None:
            raise Refusal(
                Refusal.Kind.NOT_FOUND,
                f"no run {run_id!r} here: it never joined, or ended and was forgotten",
            )
        return entry

    async def watch(self, interval: float = 0.5) -> None:
        """Check all runs every `interval` seconds, forever."""
        while True:
            await asyncio.sleep(interval)
            try:
                self.check(time.monotonic())
            except Exception:  # the check must go on for the other runs
                log.exception("watching runs failed")

    def check(self, now: float) -> None:
        """End runs whose ranks hang; forget runs that ended more than `forget_after` ago."""
        for run_id, entry in list(self._entries.items()):
            run = entry.run
            if reason := run.hang(now):
                run.fail(reason, now)
                entry.announce_failure()
            if run.ended_at is not None and now - run.ended_at > self._forget_after:
                del self._entries[run_id]
                self._metrics.forget(run_id)
                log.info("run %s: forgotten", run_id)
