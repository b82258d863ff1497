"""What if: other rules on the recorded distances, and how often each would have switched.

This is a statement about the recorded numbers. A run that had followed another rule would have
trained other weights, and would have had other distances from its first other decision on.

Not covered: training with another strategy (`runs/compare/`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from switokd.distillation.decision import Mode, Rule
from switokd.distillation.gap import epsilon
from switokd.distillation.semantics import problem_of_strategy, rule_of
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Topology
from switokd.errors import Mistakes, UsageError
from switokd.runs.compare.trials import Variant, parse_strategies
from switokd.runs.replay.derive import Derived
from switokd.runs.replay.record import Deciding

STATEMENT = (
    "what if: a statement about the recorded distances, not about how training would have gone on "
    "under another rule"
)
MOST_BINS = 600
"""Most points of the picture along the steps; twice as many are held before they are joined."""
MOST_ALTERNATIVES = 100


@dataclass(frozen=True)
class Alternative:
    """A rule to apply to the recorded distances."""

    label: str
    rule: Rule
    factor: float = 1.0
    """What the threshold is multiplied by."""
    is_scaled: bool = True
    """Whether the scales of an operator's commands apply as well."""


def alternatives(
    deciding: Deciding,
    deltas: Iterable[float] = (),
    strategies: Iterable[str] = (),
    scales: Iterable[float] = (),
) -> list[Alternative]:
    """Return the alternatives to a run's own rule.

    deltas: fixed thresholds. strategies: names or import strings with arguments, as for
    `switokd compare`. scales: factors of the run's own threshold. UsageError for a wrong one.
    """
    found: list[Alternative] = []
    mistakes = Mistakes()
    for delta in deltas:
        with mistakes.noted():
            found.append(_with_delta(deciding, delta))
    for text in strategies:
        with mistakes.noted():
            variants = parse_strategies(text, "--strategy")
            found += [_with_strategy(deciding, variant) for variant in variants]
    for scale in scales:
        with mistakes.noted():
            found.append(_with_scale(deciding, scale))
    mistakes.tell()
    if len(found) > MOST_ALTERNATIVES:
        raise UsageError(f"{len(found)} alternatives; at most {MOST_ALTERNATIVES} are compared")
    return found


def _with_delta(deciding: Deciding, delta: float) -> Alternative:
    if not 0 <= delta <= 2:
        raise UsageError(f"--delta {delta:g}: an L1 distance is from 0 to 2")
    rule = replace(deciding.rule, fixed_delta=float(delta))
    return Alternative(f"delta {delta:g}", rule, is_scaled=False)


def _with_strategy(deciding: Deciding, variant: Variant) -> Alternative:
    strategy = make_strategy(variant.name, variant.kwargs)
    is_other = bool(problem_of_strategy(deciding.semantics, strategy))
    semantics = "paper" if is_other else deciding.semantics
    return Alternative(variant.label, rule_of(strategy, semantics, deciding.topology))


def _with_scale(deciding: Deciding, scale: float) -> Alternative:
    if not 0 < scale < math.inf:
        raise UsageError(f"--scale {scale:g}: a factor of the threshold is above 0")
    return Alternative(f"scale {scale:g}", deciding.rule, float(scale))


@dataclass(frozen=True)
class Bin:
    """Sums over some steps in a row, by pair."""

    steps: int
    expert: list[int]
    """Number of steps in expert mode."""
    gap: list[float]
    delta: list[float]

    def joined(self, other: Bin) -> Bin:
        """The sums over both."""
        return Bin(
            self.steps + other.steps,
            [a + b for a, b in zip(self.expert, other.expert, strict=True)],
            [a + b for a, b in zip(self.gap, other.gap, strict=True)],
            [a + b for a, b in zip(self.delta, other.delta, strict=True)],
        )


class ReplayCount:
    """Counts the modes that one rule gives to the steps of a record.

    alternative: None for the record itself. A held teacher stays held under every rule.
    """

    def __init__(self, topology: Topology, rule: Rule, alternative: Alternative | None) -> None:
        self.label = alternative.label if alternative else "recorded"
        self._alternative, self._rule = alternative, rule
        self._pairs = topology.pairs
        number = {pair: i for i, pair in enumerate(self._pairs)}
        self._numbers_of = {
            teacher: [i for i, p in enumerate(self._pairs) if p.teacher == teacher]
            for teacher in topology.teachers
        }
        self._epsilon_of = [number[rule.epsilon_from.get(p, p)] for p in self._pairs]
        self.steps = 0
        self.expert = [0] * len(self._pairs)
        """By pair: number of steps in expert mode."""
        self.switches = [0] * len(self._pairs)
        """By pair: number of changes of the mode from one step to the next."""
        self.paused = dict.fromkeys(self._numbers_of, 0)
        """By teacher: number of paused steps."""
        self.differing = 0
        """Number of pairs in all steps whose mode is not the recorded one."""
        self.bins: list[Bin] = []
        self._width = 1
        self._last: tuple[bool, ...] = ()
        self._counts: Counter[tuple[tuple[bool, ...], tuple[bool, ...]]] = Counter()
        """Number of steps by recorded and own modes, since the last bin."""
        self._waiting = 0
        self._gaps, self._deltas = ([0.0] * len(self._pairs) for _ in range(2))

    def add(self, step: Derived) -> None:
        """Add a step."""
        deltas, modes = self._decide(step)
        for i, d in enumerate(step.distances):
            self._gaps[i] += d.gap
            self._deltas[i] += deltas[i]
        if modes != self._last:
            for i, (before, now) in enumerate(zip(self._last, modes, strict=False)):
                self.switches[i] += before is not now
            self._last = modes
        self._counts[step.modes, modes] += 1
        self._waiting += 1
        if self._waiting == self._width:
            self.flush()

    def _decide(self, step: Derived) -> tuple[Sequence[float], tuple[bool, ...]]:
        """Return thresholds and modes of a step."""
        alternative, rule = self._alternative, self._rule
        if alternative is None:
            return step.deltas, step.modes
        deltas, modes = [], []
        for i, d in enumerate(step.distances):
            delta = rule.delta(d, epsilon(step.distances[self._epsilon_of[i]]))
            if alternative.is_scaled and step.scales[i] != 1.0:
                delta *= step.scales[i]
            delta *= alternative.factor
            deltas.append(delta)
            held = step.held[i]
            modes.append(step.modes[i] if held else rule.switch(d, delta) is Mode.EXPERT)
        return deltas, tuple(modes)

    def flush(self) -> None:
        """Add up what came since the last bin. Called once more after the last step."""
        if not self._waiting:
            return
        expert = [0] * len(self._pairs)
        for (recorded, modes), count in self._counts.items():
            for i, mode in enumerate(modes):
                expert[i] += count * mode
                self.differing += count * (mode is not recorded[i])
            for teacher, numbers in self._numbers_of.items():
                is_paused = self._rule.pauses and all(modes[i] for i in numbers)
                self.paused[teacher] += count * is_paused
        self.steps += self._waiting
        self.expert = [a + b for a, b in zip(self.expert, expert, strict=True)]
        self.bins.append(Bin(self._waiting, expert, self._gaps, self._deltas))
        self._gaps, self._deltas = ([0.0] * len(self._pairs) for _ in range(2))
        self._counts.clear()
        self._waiting = 0
        if len(self.bins) == 2 * MOST_BINS:
            self.bins = [a.joined(b) for a, b in zip(*[iter(self.bins)] * 2, strict=True)]
            self._width *= 2

    def as_dict(self) -> dict[str, Any]:
        """The shares of the steps, for JSON. Without steps all are 0."""
        steps = max(self.steps, 1)
        names = [f"{p.teacher}-{p.student}" for p in self._pairs]
        return {
            "label": self.label,
            "expert": {n: count / steps for n, count in zip(names, self.expert, strict=True)},
            "paused": {teacher: count / steps for teacher, count in self.paused.items()},
            "switches": dict(zip(names, self.switches, strict=True)),
            "differing": self.differing / (steps * len(names)),
        }
