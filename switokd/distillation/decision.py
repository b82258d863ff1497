"""The decision of one step: a pure function of that step's numbers.

Whoever has the same distances reaches the same decision, so it does not matter who asks, or
how often. No state is carried from step to step.

    expert mode (teacher paused for this student)   if G > delta and e_t < e_s
    learning mode                                   otherwise

Source: Qian et al., ECCV 2022, arXiv:2209.04996, the switching between the two modes. That the
teacher be the better network (e_t < e_s) is implicit there and explicit in its published code.

Not covered: where the numbers come from (`gap.py`, the coordinator's rounds), what a network
then learns from (`strategies/`, `losses.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import product

from switokd.distillation.gap import Distances, delta, epsilon
from switokd.distillation.topology import Pair


class Mode(str, Enum):
    """Whether a pair's teacher learns from the student."""

    LEARNING = "learning"
    EXPERT = "expert"


Switch = Callable[[Distances, float], Mode]
"""A strategy's rule: one pair's distances and threshold in, its mode out."""


@dataclass(frozen=True)
class Rule:
    """All that turns distances into a decision.

    `epsilon_from` names, by pair, another pair whose distances make its epsilon
    (`semantics.py`). `fixed_delta` is a threshold in place of the adaptive one. Without `pauses` a
    teacher goes on in expert mode too.
    """

    switch: Switch
    epsilon_from: Mapping[Pair, Pair] = field(default_factory=dict)
    fixed_delta: float | None = None
    pauses: bool = True

    def delta(self, d: Distances, eps: float) -> float:
        """Threshold of a pair with these distances and this epsilon."""
        return delta(d, eps) if self.fixed_delta is None else self.fixed_delta


@dataclass(frozen=True)
class PairDecision:
    """What was decided for one pair, with all the numbers it was decided on."""

    pair: Pair
    distances: Distances
    epsilon: float
    delta: float
    mode: Mode


@dataclass(frozen=True)
class Decision:
    """One step's decision. `paused` names the teachers that skip its backward pass and update:
    those all of whose pairs are in expert mode.
    """

    step: int
    pairs: tuple[PairDecision, ...]
    paused: tuple[str, ...]

    def mode(self, pair: Pair) -> Mode:
        """Mode of `pair`; KeyError if the run has no such pair."""
        return {p.pair: p.mode for p in self.pairs}[pair]

    def is_expert(self, teacher: str) -> bool:
        """Whether all of a teacher's pairs are in expert mode."""
        return all(p.mode is Mode.EXPERT for p in self.pairs if p.pair.teacher == teacher)


def decide(step: int, distances: Mapping[Pair, Distances], rule: Rule) -> Decision:
    """Decide one step for every pair in `distances`, in their order.

    Each pair that `rule.epsilon_from` names another one for must come with that other one.
    """
    pairs = tuple(
        _decide(pair, d, epsilon(distances[rule.epsilon_from.get(pair, pair)]), rule)
        for pair, d in distances.items()
    )
    decision = Decision(step, pairs, ())
    teachers = dict.fromkeys(p.pair.teacher for p in pairs) if rule.pauses else ()
    return replace(decision, paused=tuple(t for t in teachers if decision.is_expert(t)))


def _decide(pair: Pair, d: Distances, eps: float, rule: Rule) -> PairDecision:
    threshold = rule.delta(d, eps)
    return PairDecision(pair, d, eps, threshold, rule.switch(d, threshold))


ROUNDING = 1e-6
"""Difference of two ranks' distances that the rounding of float32 can explain: so much of one, and
so much besides, because 1 - p[label] of a sure prediction has few digits left."""


def decide_early(step: int, distances: Mapping[Pair, Distances], rule: Rule) -> Decision | None:
    """Decide ahead of the authority, where no rounding could make it decide otherwise.

    None if a pair is so close to its threshold that another rank, adding up the same numbers on
    another processor, might find the other mode; or if a pair's epsilon is made of distances that
    are not here.
    """
    if not all(rule.epsilon_from.get(pair, pair) in distances for pair in distances):
        return None
    decision = decide(step, distances, rule)
    for pair in decision.pairs:
        lender = rule.epsilon_from.get(pair.pair)
        for near in _rounding_corners(pair.distances):
            epsilons = [
                epsilon(d) for d in (_rounding_corners(distances[lender]) if lender else [near])
            ]
            if any(rule.switch(near, rule.delta(near, e)) is not pair.mode for e in epsilons):
                return None
    return decision


def _rounding_corners(d: Distances) -> list[Distances]:
    """All corners of what rounding could have made of these distances."""
    bounds = []
    for distance in (d.gap, d.e_s, d.e_t):
        margin = ROUNDING * (1 + distance)
        bounds.append((max(distance - margin, 0.0), distance + margin))
    return [Distances(gap, e_s, e_t, d.n) for gap, e_s, e_t in product(*bounds)]
