"""What the coordinator counts of one run for the metrics.

The event loop updates plain numbers; a scrape reads them on another thread. What ranks send is
checked first (`measurements.py`).

Not covered: the series that a scrape makes of it (`run_series.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from switokd.distillation.decision import Decision, Mode, PairDecision
from switokd.distillation.overrides import Action
from switokd.distillation.topology import Pair
from switokd.services.coordinator.histogram import Histogram
from switokd.services.coordinator.measurements import Measured, RunMeasured, Used
from switokd.services.coordinator.run import CoordinatedRun


class ModeClock(NamedTuple):
    """Seconds that a pair has been in each mode. Replaced as a whole, for the other thread."""

    mode: Mode
    since: float
    """When the mode began, or was entered again, on the clock of `RunMetrics`."""
    before: Mapping[Mode, float]
    """Seconds before that."""

    def seconds(self, mode: Mode, now: float) -> float:
        """Return the seconds in a mode up to `now`."""
        more = max(now - self.since, 0.0) if mode is self.mode else 0.0
        return self.before[mode] + more

    def switched(self, mode: Mode, until: float, since: float) -> ModeClock:
        """Return the clock after another mode has begun. until: when the old one ended."""
        return ModeClock(mode, since, {m: self.seconds(m, until) for m in Mode})


@dataclass
class PairMetrics:
    """Last decision and counts of one pair."""

    last: PairDecision
    clock: ModeClock
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
    learning_rate: float | None = None
    gradient_norm: float | None = None
    loss_terms: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """By kind of the term and peer."""
    decision_wait: Histogram | None = None
    learning_seconds: float = 0.0
    """Of backward passes and optimizer steps, on all ranks."""
    training_seconds: float = 0.0
    """Of the training with all that belongs to it, on all ranks."""
    learned_steps: int = 0
    """Steps in which the network learned, each counted once per rank."""
    paused_steps: int = 0

    def add(self, measured: Measured) -> None:
        """Add a rank's progress; None keeps the earlier value."""
        self.samples = (self.samples or 0) + measured.samples
        self.loss = _newer(measured.loss, self.loss)
        self.train_accuracy = _newer(measured.accuracy, self.train_accuracy)
        self.test_accuracy = _newer(measured.test_accuracy, self.test_accuracy)
        self.learning_rate = _newer(measured.learning_rate, self.learning_rate)
        self.gradient_norm = _newer(measured.gradient_norm, self.gradient_norm)
        self.loss_terms = measured.loss_terms or self.loss_terms
        self.learning_seconds += measured.learning_seconds
        self.training_seconds += measured.training_seconds
        self.learned_steps += measured.learned_steps
        self.paused_steps += measured.paused_steps

    @property
    def compute_saved_ratio(self) -> float | None:
        """Share of its ranks' training time that the network's pauses have saved; None: unknown.

        A paused step saves as many seconds as a learning step takes for backward pass and update.
        """
        if not self.training_seconds or not (self.learned_steps or not self.paused_steps):
            return None
        a_step = self.learning_seconds / self.learned_steps if self.learned_steps else 0.0
        saved = self.paused_steps * a_step
        return saved / (self.training_seconds + saved)


@dataclass
class RankSeries:
    """What is counted of one rank, and what it has said of its process."""

    exchange: Histogram = field(default_factory=Histogram)
    host: str = ""
    reconnects: int = 0
    used: Used | None = None


@dataclass
class RunMetrics:
    """Metrics of one run. clock: returns seconds; now: seconds since 1970."""

    run: CoordinatedRun
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    started: float = 0.0
    """When the run was first started, in seconds since 1970; 0: not known."""
    steps: int = 0
    decided_at: float = 0.0
    """When the last step was decided, on `clock`."""
    last_decision_at: float = 0.0
    """The same in seconds since 1970; 0: no step has been decided."""
    last: Decision | None = None
    measured: RunMeasured = field(default_factory=RunMeasured)
    """What rank 0 has said of the run."""
    commands: Counter[Action] = field(default_factory=Counter)
    round_duration: Histogram = field(default_factory=Histogram)
    pairs: dict[Pair, PairMetrics] = field(default_factory=dict)
    networks: dict[str, NetworkSeries] = field(default_factory=dict)
    ranks: dict[int, RankSeries] = field(default_factory=dict)

    def network(self, name: str) -> NetworkSeries:
        """Return the metrics of a network; create them if there are none."""
        return self.networks.setdefault(name, NetworkSeries())

    def rank(self, rank: int) -> RankSeries:
        """Return the metrics of a rank; create them if there are none."""
        return self.ranks.setdefault(rank, RankSeries())

    def decision_wait(self, teacher: str) -> Histogram:
        """Return the histogram of the times that this teacher's ranks wait for a decision."""
        network = self.network(teacher)
        network.decision_wait = network.decision_wait or Histogram()
        return network.decision_wait

    def restart(self, run: CoordinatedRun) -> None:
        """Continue with the next start of the run, whose ranks may be others.

        The time without a decision until then counts for no mode.
        """
        for pair in self.pairs.values():
            pair.clock = pair.clock.switched(pair.clock.mode, self.decided_at, float("inf"))
        self.ranks = {}
        self.measured = RunMeasured()
        self.run = run

    def add_decision(self, decision: Decision, duration: float) -> None:
        """Count one step. duration: seconds from the round's first report to the decision."""
        self.steps += 1
        self.round_duration.observe(duration)
        now = self.clock()
        for p in decision.pairs:
            pair = self.pairs.get(p.pair)
            if pair is None:
                clock = ModeClock(p.mode, now, dict.fromkeys(Mode, 0.0))
                pair = self.pairs[p.pair] = PairMetrics(p, clock)
            elif pair.clock.mode is not p.mode or pair.clock.since > now:
                pair.clock = pair.clock.switched(p.mode, now, now)
            pair.switches += pair.last.mode is not p.mode
            pair.steps[p.mode] += 1
            pair.last = p
        for teacher in self.run.plan.teachers:
            network = self.network(teacher)
            network.paused = (network.paused or 0) + (teacher in decision.paused)
        self.decided_at, self.last_decision_at, self.last = now, self.now(), decision


def _newer(new: float | None, old: float | None) -> float | None:
    return old if new is None else new
