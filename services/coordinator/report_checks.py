"""What a rank reports must be possible: the plan's pairs, finite sums, some samples.

Not covered: which step comes next (`rounds.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from switokd.distillation.decision import Decision, InForce
from switokd.distillation.gap import PairSums
from switokd.distillation.overrides import LEAST_FACTOR, MOST_FACTOR
from switokd.distillation.topology import Pair
from switokd.services.coordinator.plan import LAST_STEP, Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.text import listed
from switokd.services.coordinator.totals import RunningTotal

MOST_SAMPLES = 2**62
"""Samples of one pair on all ranks; a sum of them must fit into 64 bits."""

Totals = Mapping[Pair, RunningTotal]
"""By pair: the sum of what ranks have reported of a step; empty before the first report."""


def check_report(
    plan: Plan, rank: int, step: int, pairs: Mapping[Pair, PairSums], others: Totals
) -> None:
    """Raise Refusal if the pairs are not the rank's, or if their sums are impossible.

    others: what the other ranks have reported.
    """
    if problem := _problem(plan, rank, step, pairs, others):
        raise Refusal(Refusal.Kind.INVALID_ARGUMENT, f"{plan.describe(rank)} {problem}")


def _problem(
    plan: Plan, rank: int, step: int, pairs: Mapping[Pair, PairSums], others: Totals
) -> str:
    """Say what is wrong; empty if nothing is wrong."""
    expected = plan.pairs_of[rank]
    if tuple(pairs) != expected:
        wanted = listed([f"{p.teacher}-{p.student}" for p in expected] or ["none"])
        return f"must report the pairs {wanted} at step {step}"
    most = MOST_SAMPLES // len(plan.networks_of)
    for pair, sums in pairs.items():
        # The L1 distance of two distributions is at most 2; float32 may round it up. The
        # comparison also refuses NaN. The sums of a rank without samples are zero.
        limit = 2 * sums.n * (1 + 1e-5)
        if not (0 <= sums.gap <= limit and 0 <= sums.e_s <= limit and 0 <= sums.e_t <= limit):
            return (
                "reports distances that are not finite sums of at most 2 per sample for "
                f"{pair.teacher} and {pair.student} at step {step}: {sums}"
            )
        if sums.n > most:
            return f"reports {sums.n} samples at step {step}, more than {most}"
        if sums.n == 0 and _all_others_empty(plan, pair, others):
            return (
                f"is the last to report n=0 samples for {pair.teacher} and {pair.student} at step "
                f"{step}: some rank must have some"
            )
    return ""


def _all_others_empty(plan: Plan, pair: Pair, others: Totals) -> bool:
    """Whether all other ranks of this pair have reported, and none of them has a sample."""
    if pair not in others:
        return plan.part_counts[pair] == 1
    return others[pair].lacks_one and others[pair].samples == 0


def check_scales(who: str, in_force: InForce) -> None:
    """Refusal if a factor of a threshold is impossible. who: names the rank that reports it."""
    for pair, scale in in_force.scales.items():
        if not LEAST_FACTOR <= scale <= MOST_FACTOR:
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"{who} scales the threshold of {pair.teacher} and {pair.student} by {scale}; "
                f"allowed: {LEAST_FACTOR:g} to {MOST_FACTOR:g}",
            )


def check_settled(plan: Plan, decision: Decision) -> None:
    """Raise Refusal if a decision of rank 0 has not the run's pairs, and finite numbers."""
    problem = ""
    if tuple(p.pair for p in decision.pairs) != plan.topology.pairs:
        problem = "does not have the run's pairs"
    elif not all(
        math.isfinite(number)
        for p in decision.pairs
        for number in (
            *(p.distances.gap, p.distances.e_s, p.distances.e_t, p.epsilon, p.delta),
            p.delta_scale,
        )
    ):
        problem = "has numbers that are not finite"
    elif decision.step > LAST_STEP:
        problem = "is later than any run's"
    if problem:
        raise Refusal(
            Refusal.Kind.INVALID_ARGUMENT, f"the settled decision of step {decision.step} {problem}"
        )
