"""The series of the coordinator as a whole: its runs, its journal, what it refused, its version.

Not covered: processor, memory and files of the process; prometheus_client counts them.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import grpc

from switokd.services.coordinator.journal import NO_JOURNAL, Journal
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.run import RunState
from switokd.services.coordinator.run_metrics import RunMetrics
from switokd.services.coordinator.run_series import Series

PROTOCOL = "v1"
"""Version of the contract between ranks and coordinator, as in the name of its package."""
REASONS = (
    *(k.name.lower() for k in Refusal.Kind if k is not Refusal.Kind.UNAVAILABLE),
    "unauthenticated",
)
"""Why a call is refused; UNAVAILABLE says that the coordinator stops, or that its disk is slow."""


class ServiceMetrics:
    """What is counted of the coordinator. journal: that of its runs."""

    def __init__(self, journal: Journal = NO_JOURNAL) -> None:
        self.journal = journal
        self._refused: Counter[str] = Counter()
        self._started = time.time()
        self._build = (_version(), platform.python_version(), PROTOCOL)

    def refuse(self, code: grpc.StatusCode | None) -> None:
        """Count a call or stream that has ended with a status; not every status is a refusal."""
        reason = code.name.lower() if code is not None else ""
        if reason in REASONS:
            self._refused[reason] += 1

    def series(self, runs: Iterable[RunMetrics], hidden: Counter[str]) -> Iterator[Series]:
        """Return all series. hidden: runs that are not shown, by what is not shown of them."""
        runs = list(runs)
        yield "build_info", self._build, 1
        yield "start_timestamp_seconds", (), self._started
        states = Counter(metrics.run.state for metrics in runs)
        for state in RunState:
            yield "runs", (state.value,), states[state]
        for what in ("all", "rank"):
            yield "hidden_runs", (what,), hidden[what]
        for reason in REASONS:
            yield "refused_messages", (reason,), self._refused[reason]
        if self.journal.keeps:
            yield "journal_lag_steps", (), sum(map(self._lag, runs))
            yield "journal_errors", (), self.journal.errors
            yield "journal_disk_free_bytes", (), self.journal.disk_free

    def _lag(self, metrics: RunMetrics) -> int:
        """Return the steps of a run that are decided and not yet on the disk."""
        run, decision = metrics.run, metrics.last
        if decision is None or run.ended_at is not None:
            return 0
        written = self.journal.recorded(run.run_id, run.epoch)
        return max(decision.step - max(written, run.plan.first_step - 1), 0)


def _version() -> str:
    """Return the version of the installed package, with PyTorch or without."""
    for package in ("switokd", "switokd-coordinator"):
        with suppress(PackageNotFoundError):
            return version(package)
    return "unknown"
