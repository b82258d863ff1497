"""Prometheus metrics of the coordinator.

Names follow the conventions of Prometheus (base units, `_total`, `_ratio`). Labels are bounded:
run, teacher, student, network, rank, mode, state, phase. A run's series disappear when the run is
forgotten.

Not covered: the HTTP port (`http_server.py`).
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from switokd.distillation.decision import Decision, Mode, PairDecision
from switokd.distillation.topology import Pair
from switokd.services.coordinator.limits import DEFAULTS, Limits
from switokd.services.coordinator.run import CoordinatedRun, RunState

# The first bucket ends at 50 microseconds: a round trip on one machine takes a few hundred.
SECONDS_BUCKETS = (
    *(50e-6, 100e-6, 200e-6, 350e-6, 500e-6, 750e-6),
    *(1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1.0, 5.0, 20.0),
)


class Histogram:
    """Counts of durations by bucket; much faster than the class of prometheus_client."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration; ignore a negative, NaN or infinite one."""
        if 0 <= seconds < math.inf:
            self.counts[bisect_left(SECONDS_BUCKETS, seconds)] += 1
            self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, cumulative count) of every bucket, as Prometheus expects."""
        bounds = map(floatToGoString, (*SECONDS_BUCKETS, math.inf))
        return list(zip(bounds, accumulate(list(self.counts)), strict=True))


@dataclass
class PairMetrics:
    """Last decision and counts of one pair."""

    last: PairDecision
    steps: dict[Mode, int] = field(default_factory=lambda: dict.fromkeys(Mode, 0))
    switches: int = 0


@dataclass
class NetworkSeries:
    """Counts and last progress of one network; None for a number that no rank has sent."""

    paused: int | None = None
    samples: int | None = None
    loss: float | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None
    decision_wait: Histogram | None = None


@dataclass
class RunMetrics:
    """Metrics of one run."""

    run: CoordinatedRun
    steps: int = 0
    round_duration: Histogram = field(default_factory=Histogram)
    pairs: dict[Pair, PairMetrics] = field(default_factory=dict)
    networks: dict[str, NetworkSeries] = field(default_factory=dict)
    exchanges: dict[int, Histogram] = field(default_factory=dict)
    """By rank."""

    def network(self, name: str) -> NetworkSeries:
        """Return the metrics of a network; create them if there are none."""
        return self.networks.setdefault(name, NetworkSeries())

    @property
    def line_count(self) -> int:
        """Number of lines that the run has in /metrics, about."""
        histograms = 1 + len(self.exchanges)
        histograms += sum(1 for network in list(self.networks.values()) if network.decision_wait)
        few = 20 + 6 * len(self.pairs) + 6 * len(self.networks) + 3 * self.run.world_size
        return few + (len(SECONDS_BUCKETS) + 3) * histograms

    def decision_wait(self, teacher: str) -> Histogram:
        """Return the histogram of the times that this teacher's ranks wait for a decision."""
        network = self.network(teacher)
        network.decision_wait = network.decision_wait or Histogram()
        return network.decision_wait

    def exchange(self, rank: int) -> Histogram:
        """Return the histogram of the times that a rank's exchange of logits takes."""
        return self.exchanges.setdefault(rank, Histogram())

    def add_decision(self, decision: Decision, duration: float) -> None:
        """Count one step. duration: seconds from the round's first report to the decision."""
        self.steps += 1
        self.round_duration.observe(duration)
        for p in decision.pairs:
            pair = self.pairs.get(p.pair)
            if pair is None:
                pair = self.pairs[p.pair] = PairMetrics(p)
            pair.switches += pair.last.mode is not p.mode
            pair.steps[p.mode] += 1
            pair.last = p
        for teacher in self.run.plan.teachers:
            network = self.network(teacher)
            network.paused = (network.paused or 0) + (teacher in decision.paused)

    def add_progress(
        self,
        name: str,
        samples: int,
        loss: float | None,
        accuracy: float | None,
        test_accuracy: float | None,
    ) -> None:
        """Add a rank's progress on one of its networks.

        samples: number of samples since the last progress. accuracy, test_accuracy: from 0 to 1.
        None keeps the earlier value.
        """
        network = self.network(name)
        network.samples = (network.samples or 0) + max(samples, 0)
        if loss is not None:
            network.loss = loss
        if accuracy is not None:
            network.train_accuracy = accuracy
        if test_accuracy is not None:
            network.test_accuracy = test_accuracy


PAUSE_SECONDS = 20e-6
"""A scrape lets the event loop run after each run for at least as long."""
PAIR, NETWORK, RANK = ("run", "teacher", "student"), ("run", "network"), ("run", "rank")
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gap": ("gauge", "Distillation gap G of the last step.", PAIR),
    "threshold": ("gauge", "Switching threshold delta of the last step.", PAIR),
    "learning_mode": ("gauge", "1 in learning mode, 0 in expert mode.", PAIR),
    "switches": ("counter", "Changes of a pair's mode.", PAIR),
    "pair_steps": ("counter", "Steps of a pair by mode.", (*PAIR, "mode")),
    "steps": ("counter", "Steps decided.", ("run",)),
    "decided_alone_steps": (
        "counter",
        "Steps that ranks applied without waiting for the coordinator.",
        ("run",),
    ),
    "paused_steps": ("counter", "Steps in which a teacher was paused.", NETWORK),
    "paused_ratio": ("gauge", "Share of all steps in which a teacher was paused.", NETWORK),
    "loss": ("gauge", "Mean training loss of the last progress.", NETWORK),
    "train_accuracy_ratio": ("gauge", "Top-1 accuracy in training, last progress.", NETWORK),
    "test_accuracy_ratio": ("gauge", "Top-1 accuracy on the test set, last evaluation.", NETWORK),
    "samples": ("counter", "Training samples processed.", NETWORK),
    "decision_wait_seconds": (
        "histogram",
        "Time that a teacher's rank waited for a decision.",
        NETWORK,
    ),
    "exchange_seconds": ("histogram", "Time that the exchange of logits took on a rank.", RANK),
    "round_duration_seconds": (
        "histogram",
        "Time from a step's first report to its decision.",
        ("run",),
    ),
    "connected_ranks": ("gauge", "Ranks with an open stream.", ("run",)),
    "expected_ranks": ("gauge", "Ranks of the run.", ("run",)),
    "rank_phase_seconds": ("gauge", "Time that a rank has been in its phase.", (*RANK, "phase")),
    "heartbeat_age_seconds": ("gauge", "Time since the last heartbeat of a rank.", RANK),
    "rank_waited_for": (
        "gauge",
        "1 if a rank is silent, or stays in a phase while all others wait; else 0.",
        RANK,
    ),
    "run_state": ("gauge", "1 for the state of the run, 0 for all others.", ("run", "state")),
}


class Metrics(Collector):
    """Metrics of all runs and of this process.

    The event loop updates plain numbers. A scrape, on a thread of the HTTP server, turns them into
    series. Therefore a scrape may see a step counted in one series and not yet in another.
    """

    def __init__(self, limits: Limits = DEFAULTS) -> None:
        self._most_lines, self._most_ended = limits.max_metrics_lines, limits.max_metrics_ended
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(self)
        self._runs: dict[str, RunMetrics] = {}

    def add_run(self, run: CoordinatedRun) -> RunMetrics:
        """Show the metrics of a run until `forget`; return them."""
        metrics = self._runs[run.run_id] = RunMetrics(run)
        return metrics

    def forget(self, run_id: str) -> None:
        """Remove all series of a run."""
        self._runs.pop(run_id, None)

    def collect(self) -> Iterator[Metric]:
        """Return all series with their current values; prometheus_client calls this."""
        families = {
            name: Metric(f"switokd_{name}", text, kind)
            for name, (kind, text, _) in FAMILIES.items()
        }
        runs = list(self._runs.values())  # a copy: the event loop may add a run
        for metrics in self._shown(runs):
            for name, labels, value in _series(metrics):
                _add(families[name], dict(zip(FAMILIES[name][2], labels, strict=True)), value)
            time.sleep(PAUSE_SECONDS)
        yield from families.values()

    def _shown(self, runs: list[RunMetrics]) -> list[RunMetrics]:
        """Return runs within the limits: those with connected ranks first, then the newest.

        Of those that have ended, first the ones that failed: there is an alert for them.
        """
        runs.reverse()
        ended = [metrics for metrics in runs if metrics.run.ended_at is not None]
        ended.sort(key=lambda metrics: not metrics.run.failure)
        runs = [metrics for metrics in runs if metrics.run.ended_at is None]
        runs.sort(key=lambda metrics: not metrics.run.connected)
        runs += ended[: self._most_ended]
        lines = accumulate(metrics.line_count for metrics in runs)
        return runs[: bisect_right(list(lines), self._most_lines)]


Series = tuple[str, tuple[str, ...], float | Histogram | None]
"""Name of the family, values of its labels, value; a series whose value is None is left out."""


def _add(family: Metric, labels: dict[str, str], value: float | Histogram | None) -> None:
    """Add the samples of one series; a histogram has one sample per bucket, a count and a sum."""
    if isinstance(value, Histogram):
        buckets = value.buckets()
        for bound, count in buckets:
            family.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, count)
        family.add_sample(f"{family.name}_count", labels, buckets[-1][1])
        family.add_sample(f"{family.name}_sum", labels, value.total)
    elif value is not None:
        suffix = "_total" if family.type == "counter" else ""
        family.add_sample(family.name + suffix, labels, value)


def _series(metrics: RunMetrics) -> Iterator[Series]:
    """Return all series of one run. Lists are copies, because the event loop may add an entry."""
    run, run_id, steps = metrics.run, metrics.run.run_id, metrics.steps
    yield "connected_ranks", (run_id,), len(run.connected)
    yield "expected_ranks", (run_id,), run.world_size
    for state in RunState:
        yield "run_state", (run_id, state.value), state is run.state
    if run.decided_alone:
        yield "decided_alone_steps", (run_id,), run.decided_alone
    if steps:
        yield "steps", (run_id,), steps
        yield "round_duration_seconds", (run_id,), metrics.round_duration
    for pair, pair_metrics in list(metrics.pairs.items()):
        labels: tuple[str, ...] = (run_id, pair.teacher, pair.student)
        yield "gap", labels, pair_metrics.last.distances.gap
        yield "threshold", labels, pair_metrics.last.delta
        yield "learning_mode", labels, pair_metrics.last.mode is Mode.LEARNING
        yield "switches", labels, pair_metrics.switches
        for mode, count in pair_metrics.steps.items():
            yield "pair_steps", (*labels, mode.value), count
    for name, network in list(metrics.networks.items()):
        labels = (run_id, name)
        if network.paused is not None and steps:
            yield "paused_steps", labels, network.paused
            yield "paused_ratio", labels, network.paused / steps
        yield "loss", labels, network.loss
        yield "train_accuracy_ratio", labels, network.train_accuracy
        yield "test_accuracy_ratio", labels, network.test_accuracy
        yield "samples", labels, network.samples
        yield "decision_wait_seconds", labels, network.decision_wait
    for rank, exchange in list(metrics.exchanges.items()):
        if any(exchange.counts):
            yield "exchange_seconds", (run_id, str(rank)), exchange
    for health in run.health.ranks:
        labels = (run_id, str(health.rank))
        yield "rank_phase_seconds", (*labels, health.heartbeat.phase), health.phase_seconds
        yield "heartbeat_age_seconds", labels, health.age
        yield "rank_waited_for", labels, health.is_waited_for
