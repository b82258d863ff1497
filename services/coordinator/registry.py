"""Keeps all runs of one coordinator: creates, finds, watches and forgets them.

Runs of an earlier coordinator come from its journal.

Not covered: limits of one run (`rounds.py`, `admission.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping

from switokd.services.coordinator.history import HistoryMemory, RunHistory, history_of_start
from switokd.services.coordinator.identity import RunSecret
from switokd.services.coordinator.journal import NO_JOURNAL, Journal
from switokd.services.coordinator.journal_file import StoredRun
from switokd.services.coordinator.journal_history import history_from
from switokd.services.coordinator.limits import DEFAULTS, Limits, exceeded
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.outbox import RunStreams
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.round_spans import NO_SPANS
from switokd.services.coordinator.run import CoordinatedRun, RunState
from switokd.services.coordinator.run_entry import RunEntry
from switokd.services.coordinator.run_metrics import RunMetrics
from switokd.services.coordinator.status import RunTimes

ASLEEP_SECONDS = 2.0
"""If the watch was not called for longer than this, the whole process was stopped."""

JOINED_SECONDS = 2.0
"""A rank that has joined attaches well within this time."""

log = logging.getLogger(__name__)


class AwakeClock:
    """The time in seconds, without the times at which this process was stopped.

    Otherwise all ranks would seem to have been silent for so long. clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._asleep = 0.0
        self._watched_at = clock()

    def now(self) -> float:
        """Return the time."""
        return self._clock() - self._asleep

    def note_sleep(self) -> None:
        """Take the time for which this process was stopped out of `now`; call this often."""
        now = self._clock()
        if now - self._watched_at > ASLEEP_SECONDS:
            self._asleep += now - self._watched_at
        self._watched_at = now


class RunRegistry:
    """Runs by id.

    strategies: import strings that a plan may name. The coordinator refuses all others, because a
    plan may come from anyone who reaches its port. forget_after: seconds from a run's end until
    it disappears from memory and metrics. journal: holds the runs of earlier coordinators, and
    those that have ended. clock: returns seconds.
    """

    def __init__(
        self,
        metrics: Metrics,
        strategies: Collection[str] = (),
        forget_after: float = DEFAULTS.forget_after,
        journal: Journal = NO_JOURNAL,
        clock: Callable[[], float] = time.monotonic,
        limits: Limits = DEFAULTS,
    ) -> None:
        self.limits, self._metrics = limits, metrics
        self._strategies = frozenset(strategies)
        self._forget_after = forget_after
        self._entries: dict[str, RunEntry] = {}
        self.is_draining = False
        """Whether this coordinator stops."""
        self.journal = metrics.service.journal = journal
        self.round_spans = NO_SPANS
        self._history_memory = HistoryMemory(limits.max_history_mib * 2**20)
        self._clock = AwakeClock(clock)
        for stored in journal.stored():
            self._continue(stored)

    def _continue(self, stored: StoredRun) -> None:
        """Continue a run of the journal, unless this coordinator may not decide it."""
        plan, now = stored.plan, self.now()
        try:
            run = self._make(stored.run_id, plan, now, stored.epoch)
        except Refusal as refusal:
            log.error("run %s of the journal is left out: %s", stored.run_id, refusal)
            return
        run.restore(stored.settled, stored.decisions, stored.steps, now)
        run.commands.restore(stored.commands)
        started = stored.started or time.time()
        secret = RunSecret(self.journal.secret_digest(run.run_id))
        history = history_from(self.journal.path, run.run_id, plan, self._history_memory)
        self._add(run, self._metrics.add_run(run), RunTimes(started), history, secret)
        log.info("run %s: continues from the journal", run.run_id)

    def now(self) -> float:
        """Return the time in seconds; see `AwakeClock`."""
        return self._clock.now()

    @property
    def open_streams(self) -> int:
        """Number of open streams of all runs."""
        return sum(len(entry.streams) for entry in self._entries.values())

    def join(
        self, run_id: str, rank: int, plan: Plan, now: float, epoch: int = 0, secret: bytes = b""
    ) -> CoordinatedRun:
        """Add a rank to its run, and create the run for its first rank.

        epoch: a higher one than the run's replaces the run. secret: that of the run; its first rank
        sets it. Refusal if no run can follow the plan, if the run has another plan or another
        secret, or if the epoch is over.
        """
        if not run_id:
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, "a run needs an id")
        entry = self._entries.get(run_id)
        proven = _prove(run_id, entry, self.journal, epoch, secret)
        if entry and epoch < entry.run.epoch:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{entry.run.describe(rank)} belongs to start {epoch} of run {run_id!r}, but start "
                f"{entry.run.epoch} has taken over",
            )
        is_new = entry is None or epoch > entry.run.epoch
        run = self._make(run_id, plan, now, epoch) if entry is None or is_new else entry.run
        run.join(rank, plan)
        if entry is None:
            self._make_room(now)
        if is_new:
            self._replace(entry, run, proven)
        elif entry is not None and proven is not entry.secret:
            entry.secret.digest = proven.digest
            self.journal.note_secret(run_id, proven.digest)
        return run

    def _make(self, run_id: str, plan: Plan, now: float, epoch: int) -> CoordinatedRun:
        return CoordinatedRun(run_id, plan, now, self._strategies, epoch, self.limits)

    def _make_room(self, now: float) -> None:
        """Forget a run if there are too many; Refusal if all of them have ranks.

        It is the one that ended first; without one, the oldest whose ranks have joined but not
        attached, as a rank does at once.
        """
        most = self.limits.max_runs
        if len(self._entries) < most:
            return
        runs = [entry.run for entry in self._entries.values()]
        ended = [(run.ended_at, run.run_id) for run in runs if run.ended_at is not None]
        absent = [
            (run.created_at, run.run_id)
            for run in runs
            if run.state is RunState.JOINING
            and not run.connected
            and now - run.created_at > JOINED_SECONDS
        ]
        if not (ended or absent):
            raise exceeded(f"the coordinator has {most} runs", "max_runs", most)
        self._forget(min(ended or absent)[1])

    def _forget(self, run_id: str) -> None:
        self._entries.pop(run_id).history.close()
        self._metrics.forget(run_id)
        self.journal.forget(run_id)
        log.info("run %s: forgotten", run_id)

    def _replace(self, entry: RunEntry | None, run: CoordinatedRun, secret: RunSecret) -> None:
        """Take in a new run, or the new epoch of a run."""
        metrics = entry.metrics if entry else self._metrics.add_run(run)
        if entry:
            run.commands.restore(entry.run.commands.all)
            entry.streams.fail(f"start {run.epoch} of run {run.run_id!r} has taken over")
            metrics.restart(run)
        log.info("run %s: new, %s, %d ranks", run.run_id, run.plan.topology.name, run.world_size)
        if secret:  # before the run itself, so that no crash leaves the run without its secret
            self.journal.note_secret(run.run_id, secret.digest)
        times = RunTimes(entry.times.started if entry else time.time())
        self.journal.begin(run.run_id, run.epoch, run.plan, times.started)
        before = entry.history if entry else None
        history = history_of_start(before, run.plan, run.epoch, self._history_memory)
        self._add(run, metrics, times, history, secret)

    def _add(
        self,
        run: CoordinatedRun,
        metrics: RunMetrics,
        times: RunTimes,
        history: RunHistory,
        secret: RunSecret,
    ) -> None:
        metrics.started = times.started
        entry = RunEntry(run, RunStreams(), metrics, self.journal, times, history, secret)
        self._entries[run.run_id] = entry

    @property
    def entries(self) -> Mapping[str, RunEntry]:
        """The runs in memory, by id."""
        return self._entries

    def find(self, run_id: str) -> RunEntry:
        """Return a run; Refusal if there is none with this id."""
        self.limits.check_name("the run", run_id)
        entry = self._entries.get(run_id)
        if entry is None:
            raise Refusal(
                Refusal.Kind.NOT_FOUND,
                f"no run {run_id!r} here: it never joined, or ended and was forgotten",
            )
        return entry

    def drain(self) -> None:
        """End all streams, because this coordinator stops."""
        self.is_draining = True
        for entry in self._entries.values():
            entry.drain()

    async def watch(self, interval: float = 0.5) -> None:
        """Check all runs every `interval` seconds, forever; streams are served in between."""
        while True:
            await asyncio.sleep(interval)
            self._clock.note_sleep()
            for run_id in list(self._entries):
                try:
                    self._check(run_id, self.now())
                except Exception:  # the check must go on for the other runs
                    log.exception("watching run %s failed", run_id)
                await asyncio.sleep(0)

    def check_all(self) -> None:
        """Check all runs, as the server asks twice a second."""
        self._clock.note_sleep()
        self.check(self.now())

    def recorded(self, run: CoordinatedRun) -> int:
        """Return the last step of a run that is in the journal, on the disk; 0: none."""
        return self.journal.recorded(run.run_id, run.epoch)

    def check(self, now: float) -> None:
        """End runs whose ranks hang; forget runs that ended more than `forget_after` ago."""
        for run_id in list(self._entries):
            self._check(run_id, now)

    def _check(self, run_id: str, now: float) -> None:
        if entry := self._entries.get(run_id):
            run = entry.run
            entry.check(now)
            if run.ended_at is not None and now - run.ended_at > self._forget_after:
                self._forget(run_id)


def _prove(
    run_id: str, entry: RunEntry | None, journal: Journal, epoch: int, secret: bytes
) -> RunSecret:
    """Return what to keep of the run's secret; Refusal if it is not this one.

    A run without a secret gets that of its first rank: of its first epoch, of a later one, or the
    first since this coordinator has read the run from the journal of an older one.
    """
    known = entry.secret if entry else RunSecret(journal.secret_digest(run_id))
    is_first = entry is None or epoch > entry.run.epoch or not entry.run.joined
    if not known and is_first:
        return RunSecret.of(secret) if secret else known
    known.check(secret, run_id)
    return known
