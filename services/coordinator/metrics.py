"""What Prometheus scrapes, and the HTTP port it is scraped from.

Names follow Prometheus' practice (base units, `_total`, `_ratio`); labels are bounded: run,
teacher, student, network, mode, state. A run's series are dropped when the run is forgotten.

Not covered: authentication of the port.
"""

from __future__ import annotations

import math
from bisect import bisect_left
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
from switokd.services.coordinator.rounds import Phase, RunState

# From 50 microseconds: a round trip on one machine takes a few hundred.
SECONDS_BUCKETS = (
    *(50e-6, 100e-6, 200e-6, 350e-6, 500e-6, 750e-6),
    *(1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1.0, 5.0, 20.0),
)


class Distribution:
    """Durations by bucket. Adding to it costs a fraction of what a client library's does."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration; what is none (negative, NaN, infinite) is left out."""
        if 0 <= seconds < math.inf:
            self.counts[bisect_left(SECONDS_BUCKETS, seconds)] += 1
            self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulated counts by upper bound, as Prometheus has them."""
        bounds = map(floatToGoString, (*SECONDS_BUCKETS, math.inf))
        return list(zip(bounds, accumulate(list(self.counts)), strict=True))


@dataclass
class PairNumbers:
    """A pair's last numbers and its counts."""

    last: PairDecision
    steps: dict[Mode, int] = field(default_factory=lambda: dict.fromkeys(Mode, 0))
    switches: int = 0


@dataclass
class NetworkNumbers:
    """A network's counts and what its ranks said lately; None where nothing was said."""

    paused: int | None = None
    samples: int | None = None
    loss: float | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None
    decision_wait: Distribution | None = None


@dataclass
class RunNumbers:
    """All that is shown of one run."""

    run: RunState
    steps: int = 0
    round_duration: Distribution = field(default_factory=Distribution)
    pairs: dict[Pair, PairNumbers] = field(default_factory=dict)
    networks: dict[str, NetworkNumbers] = field(default_factory=dict)
    exchanges: dict[int, Distribution] = field(default_factory=dict)
    """By rank."""

    def network(self, name: str) -> NetworkNumbers:
        """A network's numbers, kept from now on."""
        return self.networks.setdefault(name, NetworkNumbers())

    def decision_wait(self, name: str) -> Distribution:
        """Where to add how long a rank of this teacher waited for decisions."""
        numbers = self.network(name)
        numbers.decision_wait = numbers.decision_wait or Distribution()
        return numbers.decision_wait

    def exchange(self, rank: int) -> Distribution:
        """Where to add how long the exchange took on a rank."""
        return self.exchanges.setdefault(rank, Distribution())

    def decided(self, decision: Decision, duration: float) -> None:
        """Count one step's decision."""
        self.steps += 1
        self.round_duration.add(duration)
        for p in decision.pairs:
            numbers = self.pairs.get(p.pair)
            if numbers is None:
                numbers = self.pairs[p.pair] = PairNumbers(p)
            numbers.switches += numbers.last.mode is not p.mode
            numbers.steps[p.mode] += 1
            numbers.last = p
        for teacher in self.run.plan.teachers:
            network = self.network(teacher)
            network.paused = (network.paused or 0) + (teacher in decision.paused)

    def progressed(
        self,
        network: str,
        samples: int,
        loss: float | None,
        accuracy: float | None,
        test_accuracy: float | None,
    ) -> None:
        """Take what a rank says of a network that it holds; None leaves what was said before."""
        numbers = self.network(network)
        numbers.samples = (numbers.samples or 0) + max(samples, 0)
        if loss is not None:
            numbers.loss = loss
        if accuracy is not None:
            numbers.train_accuracy = accuracy
        if test_accuracy is not None:
            numbers.test_accuracy = test_accuracy


PAIR, NETWORK, RANK = ("run", "teacher", "student"), ("run", "network"), ("run", "rank")
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gap": ("gauge", "Distillation gap G of the last step.", PAIR),
    "threshold": ("gauge", "Switching threshold delta, last step.", PAIR),
    "learning_mode": ("gauge", "1 learning mode, 0 expert mode.", PAIR),
    "switches": ("counter", "Changes of a pair's mode.", PAIR),
    "pair_steps": ("counter", "Steps by mode.", (*PAIR, "mode")),
    "steps": ("counter", "Steps decided.", ("run",)),
    "paused_steps": ("counter", "Steps a teacher was paused.", NETWORK),
    "paused_ratio": ("gauge", "Share of all steps so far that a teacher was paused.", NETWORK),
    "loss": ("gauge", "Mean training loss, lately.", NETWORK),
    "train_accuracy_ratio": ("gauge", "Top-1 accuracy on training batches, lately.", NETWORK),
    "test_accuracy_ratio": ("gauge", "Top-1 accuracy on the test set, last evaluation.", NETWORK),
    "samples": ("counter", "Training samples seen.", NETWORK),
    "decision_wait_seconds": (
        "histogram",
        "Time a rank of a teacher stood still for a decision.",
        NETWORK,
    ),
    "exchange_seconds": ("histogram", "Time the exchange of logits took on a rank.", RANK),
    "round_duration_seconds": (
        "histogram",
        "Time from a step's first report to its decision.",
        ("run",),
    ),
    "connected_ranks": ("gauge", "Ranks with an open stream.", ("run",)),
    "expected_ranks": ("gauge", "Ranks the run consists of.", ("run",)),
    "run_state": ("gauge", "1 for the state the run is in.", ("run", "state")),
}


class Metrics(Collector):
    """The coordinator's registry.

    The event loop keeps plain numbers; series are made of them when Prometheus asks, on its
    thread. A scrape may then see a step counted in one series and not yet in another.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(self)
        self._runs: dict[str, RunNumbers] = {}

    def of(self, run: RunState) -> RunNumbers:
        """A run's numbers, shown from now on until it is forgotten."""
        return self._runs.setdefault(run.run_id, RunNumbers(run))

    def forget(self, run_id: str) -> None:
        """Drop all series of a run."""
        self._runs.pop(run_id, None)

    def collect(self) -> Iterator[Metric]:
        """All series as they stand."""
        families = {
            name: Metric(f"switokd_{name}", text, kind)
            for name, (kind, text, _) in FAMILIES.items()
        }
        for numbers in list(self._runs.values()):  # copies: the event loop adds to them
            for name, labels, value in _series(numbers):
                _add(families[name], dict(zip(FAMILIES[name][2], labels, strict=True)), value)
        yield from families.values()


Series = tuple[str, tuple[str, ...], float | Distribution | None]
"""Family, the values of its labels, and what it shows; None shows nothing."""


def _add(family: Metric, labels: dict[str, str], value: float | Distribution | None) -> None:
    """Add what Prometheus calls samples: one, or one per bucket."""
    if isinstance(value, Distribution):
        buckets = value.buckets()
        for bound, count in buckets:
            family.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, count)
        family.add_sample(f"{family.name}_count", labels, buckets[-1][1])
        family.add_sample(f"{family.name}_sum", labels, value.total)
    elif value is not None:
        suffix = "_total" if family.type == "counter" else ""
        family.add_sample(family.name + suffix, labels, value)


def _series(numbers: RunNumbers) -> Iterator[Series]:
    run, steps = numbers.run, numbers.steps
    run_id = run.run_id
    yield "connected_ranks", (run_id,), len(run.connected)
    yield "expected_ranks", (run_id,), run.world_size
    for state in Phase:
        yield "run_state", (run_id, state.value), state is run.state
    if steps:
        yield "steps", (run_id,), steps
        yield "round_duration_seconds", (run_id,), numbers.round_duration
    for pair, of_pair in list(numbers.pairs.items()):
        labels = (run_id, pair.teacher, pair.student)
        yield "gap", labels, of_pair.last.distances.gap
        yield "threshold", labels, of_pair.last.delta
        yield "learning_mode", labels, of_pair.last.mode is Mode.LEARNING
        yield "switches", labels, of_pair.switches
        for mode, count in of_pair.steps.items():
            yield "pair_steps", (*labels, mode.value), count
    for name, network in list(numbers.networks.items()):
        of_network = (run_id, name)
        if network.paused is not None and steps:
            yield "paused_steps", of_network, network.paused
            yield "paused_ratio", of_network, network.paused / steps
        yield "loss", of_network, network.loss
        yield "train_accuracy_ratio", of_network, network.train_accuracy
        yield "test_accuracy_ratio", of_network, network.test_accuracy
        yield "samples", of_network, network.samples
        yield "decision_wait_seconds", of_network, network.decision_wait
    for rank, exchange in list(numbers.exchanges.items()):
        if any(exchange.counts):
            yield "exchange_seconds", (run_id, str(rank)), exchange
