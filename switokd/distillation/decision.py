"""The decision of one step: a pure function of the distances of that step.

    expert mode (teacher paused for this student)   if G > delta and e_t < e_s
    learning mode                                   otherwise

A command of an operator may hold a pair in a mode, or scale its delta (`overrides.py`).

No state is carried from step to step. The coordinator and every rank therefore reach the same
decision from the same distances, also when they decide a step twice.

Source: Qian et al., ECCV 2022, arXiv:2209.04996, the switching between the two modes. The second
condition, e_t < e_s (the teacher is better), is implicit in the paper and explicit in its code.

Not covered: where the distances come from (`gap.py`, the coordinator's rounds), the KL terms that
follow from a decision (`strategies/`, `losses.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import product
from types import MappingProxyType

from switokd.distillation.gap import Distances, delta, epsilon
from switokd.distillation.topology import Pair


class Mode(str, Enum):
    """Mode of a pair: in learning mode the teacher learns from the student."""

    LEARNING = "learning"
    EXPERT = "expert"


Switch = Callable[[Distances, float], Mode]
"""Switching function of a strategy: (distances, threshold delta) of a pair -> mode."""


@dataclass(frozen=True)
class Rule:
    """How distances are turned into a decision."""

    switch: Switch
    epsilon_from: Mapping[Pair, Pair] = field(default_factory=dict)
    """Pairs whose epsilon is computed from another pair's distances (`semantics.py`)."""
    fixed_delta: float | None = None
    """Threshold that replaces the adaptive one; None keeps the adaptive one."""
    pauses: bool = True
    """Whether a teacher pauses if all its pairs are in expert mode."""

    def delta(self, d: Distances, eps: float) -> float:
        """Threshold of a pair with distances `d` and epsilon `eps`."""
        return delta(d, eps) if self.fixed_delta is None else self.fixed_delta


@dataclass(frozen=True)
class InForce:
    """What an operator's commands change in one step; mostly nothing. See `overrides.py`."""

    holds: Mapping[Pair, Mode] = field(default_factory=dict)
    """Pairs that have this mode whatever their distances are."""
    scales: Mapping[Pair, float] = field(default_factory=dict)
    """Pairs whose threshold is multiplied by this factor."""

    def __bool__(self) -> bool:
        return bool(self.holds or self.scales)


NOTHING = InForce()


@dataclass(frozen=True)
class PairDecision:
    """Mode of one pair, with all numbers that led to it."""

    pair: Pair
    distances: Distances
    epsilon: float
    delta: float
    """The threshold after the scale."""
    mode: Mode
    held: bool = False
    """Whether a command is the reason for the mode."""
    delta_scale: float = 1.0
    """The factor in the threshold that a command has set."""


@dataclass(frozen=True)
class Decision:
    """Decision of one step."""

    step: int
    pairs: tuple[PairDecision, ...]
    paused: tuple[str, ...]
    """Teachers that skip backward pass and optimizer step: all their pairs are in expert mode."""

    def mode(self, pair: Pair) -> Mode:
        """Mode of `pair`. KeyError if the decision does not contain the pair."""
        return {p.pair: p.mode for p in self.pairs}[pair]

    def is_expert(self, teacher: str) -> bool:
        """Whether all of a teacher's pairs are in expert mode."""
        return all(p.mode is Mode.EXPERT for p in self.pairs if p.pair.teacher == teacher)


def decide(
    step: int,
    distances: Mapping[Pair, Distances],
    rule: Rule,
    settled: Mapping[Pair, Mode] = MappingProxyType({}),
    in_force: InForce = NOTHING,
) -> Decision:
    """Decide one step for all pairs in `distances`; the result keeps their order.

    settled: modes that a rank has chosen where rounding matters (see `unsafe_pairs`). in_force:
    what commands hold and scale in this step; a hold comes before everything else.
    KeyError if `rule.epsilon_from` names a pair that `distances` does not contain.
    """
    pairs = tuple(
        _decide(pair, d, epsilon(distances[rule.epsilon_from.get(pair, pair)]), rule)
        for pair, d in distances.items()
    )
    if in_force.scales:
        pairs = tuple(_scaled(p, in_force.scales.get(p.pair, 1.0), rule) for p in pairs)
    if settled:
        pairs = tuple(replace(p, mode=settled.get(p.pair, p.mode)) for p in pairs)
    if holds := in_force.holds:
        pairs = tuple(
            replace(p, mode=holds[p.pair], held=True) if p.pair in holds else p for p in pairs
        )
    teachers = dict.fromkeys(p.pair.teacher for p in pairs) if rule.pauses else ()
    learning = {p.pair.teacher for p in pairs if p.mode is not Mode.EXPERT}
    return Decision(step, pairs, tuple(t for t in teachers if t not in learning))


def _decide(pair: Pair, d: Distances, eps: float, rule: Rule) -> PairDecision:
    threshold = rule.delta(d, eps)
    return PairDecision(pair, d, eps, threshold, rule.switch(d, threshold))


def _scaled(p: PairDecision, scale: float, rule: Rule) -> PairDecision:
    """Decide a pair again with its threshold multiplied by `scale`."""
    threshold = p.delta * scale
    mode = rule.switch(p.distances, threshold)
    return replace(p, delta=threshold, mode=mode, delta_scale=scale)


ROUNDING = 1e-6
"""Largest relative and absolute difference that float32 rounding may cause between two ranks.

The absolute part is needed because 1 - p[label] of a confident prediction has few exact digits.
"""


def unsafe_pairs(
    decision: Decision,
    distances: Mapping[Pair, Distances],
    rule: Rule,
    rounding: float = ROUNDING,
) -> tuple[Pair, ...]:
    """Return the pairs for which another processor might compute the other mode.

    These are so close to their threshold that rounding matters. A pair that a command holds is
    not among them. decision: made from `distances`. rounding: largest relative and absolute
    difference.
    """
    return tuple(p.pair for p in decision.pairs if not _is_safe(p, distances, rule, rounding))


def _is_safe(
    decided: PairDecision, distances: Mapping[Pair, Distances], rule: Rule, rounding: float
) -> bool:
    if decided.held:
        return True
    epsilon_pair = rule.epsilon_from.get(decided.pair)
    for d in _rounding_corners(decided.distances, rounding):
        corners = _rounding_corners(distances[epsilon_pair], rounding) if epsilon_pair else [d]
        thresholds = (rule.delta(d, epsilon(corner)) * decided.delta_scale for corner in corners)
        if any(rule.switch(d, threshold) is not decided.mode for threshold in thresholds):
            return False
    return True


def _rounding_corners(d: Distances, rounding: float) -> list[Distances]:
    """The 8 corner cases of the distances within the rounding error."""
    bounds = []
    for distance in (d.gap, d.e_s, d.e_t):
        margin = rounding * (1 + distance)
        bounds.append((max(distance - margin, 0.0), distance + margin))
    return [Distances(gap, e_s, e_t, d.n) for gap, e_s, e_t in product(*bounds)]
