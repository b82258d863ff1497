"""Why a teacher learns or pauses in a step, in one word, from the step's decision.

Not covered: the decision itself (`distillation/decision.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from switokd.distillation.decision import Decision, Mode, PairDecision

GAP_WITHIN_THRESHOLD = "gap_within_threshold"
"""It learns: of a student from which it learns, the gap is at most the threshold."""
NOT_BETTER = "not_better"
"""It learns: the gaps are above the thresholds, but it is not better than a student."""
GAP_TOO_LARGE = "gap_too_large"
"""It pauses: all gaps are above their thresholds, and it is better than all students."""
HELD_LEARNING, HELD_PAUSED = "held_learning", "held_paused"
"""A command holds it."""
STRATEGY_LEARNING, STRATEGY_PAUSED = "strategy_learning", "strategy_paused"
"""The strategy wants it so, whatever the gap is."""

REASONS = (
    *(GAP_WITHIN_THRESHOLD, NOT_BETTER, GAP_TOO_LARGE),
    *(HELD_LEARNING, HELD_PAUSED, STRATEGY_LEARNING, STRATEGY_PAUSED),
)


def reasons(decision: Decision, teachers: Sequence[str]) -> list[str]:
    """Return the reason of each teacher, in one of the words of `REASONS`."""
    pairs: dict[str, list[PairDecision]] = {name: [] for name in teachers}
    for p in decision.pairs:
        pairs[p.pair.teacher].append(p)
    paused = decision.paused
    return [_reason(pairs[name], name in paused) for name in teachers]


def _reason(pairs: Sequence[PairDecision], is_paused: bool) -> str:
    if any(p.held for p in pairs):
        return HELD_PAUSED if is_paused else HELD_LEARNING
    if is_paused:
        is_ahead = all(p.distances.gap > p.delta and _is_better(p) for p in pairs)
        return GAP_TOO_LARGE if is_ahead else STRATEGY_PAUSED
    learning = [p for p in pairs if p.mode is Mode.LEARNING]
    if any(p.distances.gap <= p.delta for p in learning):
        return GAP_WITHIN_THRESHOLD
    if any(not _is_better(p) for p in learning):
        return NOT_BETTER
    return STRATEGY_LEARNING


def _is_better(p: PairDecision) -> bool:
    return p.distances.e_t < p.distances.e_s
