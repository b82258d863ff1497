"""The rounds of one run: the ranks' reports in, decisions out.

A *round* is one step. The first report of the step opens the round. The round is decided when every
rank that holds a teacher has reported, and complete when all ranks have reported. A report of a
rank without teachers has no pairs and shows that the rank is alive.

Reports of one rank come in the order of steps, but a rank without teachers may lag behind.
Therefore several rounds may be open. A step that a rank has reported before is ignored: a rank
reports again what a lost coordinator, or a broken stream, may have swallowed.

*Settled* steps are in the record of rank 0; no decision and no report of them is needed any more.

Not covered: writing the decisions down (`journal.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from switokd.distillation.decision import NOTHING, Decision, InForce, Mode, Rule, decide
from switokd.distillation.gap import Distances, PairSums
from switokd.distillation.topology import Pair
from switokd.services.coordinator.limits import DEFAULTS, Limits, exceeded
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.ranks import Ranks
from switokd.services.coordinator.received import ReceivedSteps
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.report_checks import check_report, check_settled
from switokd.services.coordinator.steps import StepRange, StepSet
from switokd.services.coordinator.totals import RunningTotal

MOST_GAPS = 10_000
"""Gaps of the settled steps; no honest record has nearly as many."""
PARTS_PER_ROUND = 4
"""A round with more parts than this counts as several, against the limit of open rounds."""


@dataclass
class Round:
    """Reports of one step."""

    opened_at: float
    reported: set[int] = field(default_factory=set)
    """Ranks that have reported."""
    totals: dict[Pair, RunningTotal] = field(default_factory=dict)
    """The sum of each pair, once a rank that holds a teacher has reported; empty once decided."""
    missing: int = 0
    """Parts of the sums that are still to come."""
    modes: dict[Pair, Mode] = field(default_factory=dict)
    """Modes that a teacher's first rank has chosen, where rounding matters."""
    in_force: InForce = NOTHING
    """What commands hold and scale, as the first rank of each teacher has said."""

    def add(self, plan: Plan, rank: int, pairs: Mapping[Pair, PairSums]) -> None:
        """Add what a rank has reported, all pairs of its teachers."""
        if not self.totals:
            self.totals = {pair: RunningTotal(count) for pair, count in plan.part_counts.items()}
            self.missing = plan.part_count
        for place, (pair, sums) in zip(plan.places_of[rank], pairs.items(), strict=True):
            self.totals[pair].add(place, sums)
        self.missing -= len(pairs)

    def override(self, first: Set[Pair], in_force: InForce) -> None:
        """Note what commands change. first: pairs whose first rank says so."""
        holds, scales = dict(self.in_force.holds), dict(self.in_force.scales)
        holds.update({p: m for p, m in in_force.holds.items() if p in first})
        scales.update({p: s for p, s in in_force.scales.items() if p in first})
        self.in_force = InForce(holds, scales)

    def distances(self) -> dict[Pair, Distances]:
        """Return the means of each pair, once all parts are there."""
        values = {pair: total.value for pair, total in self.totals.items()}
        return {pair: value.mean() for pair, value in values.items() if value}


class OldestRound(NamedTuple):
    """Oldest round that is not complete."""

    step: int
    opened_at: float
    reported: Set[int]


class DecidedRound(NamedTuple):
    """A step's decision. duration: seconds from the round's first report to the decision."""

    decision: Decision
    duration: float


class Needs(NamedTuple):
    """What coordinator and rank need from each other when a stream opens."""

    next_step: int
    """Step that the rank must report next."""
    missing: Sequence[StepRange]
    """Settled steps that the coordinator has not heard of."""
    decisions: Sequence[Decision]
    """Decisions that the rank may not have."""


class Rounds:
    """Open rounds of one run, and its decisions. A refused report changes nothing."""

    def __init__(self, plan: Plan, ranks: Ranks, rule: Rule, limits: Limits = DEFAULTS) -> None:
        self._plan = plan
        self._ranks = ranks
        self._rule = rule
        self._before = plan.first_step - 1
        self._step_of = dict.fromkeys(plan.networks_of, self._before)
        self._open: dict[int, Round] = {}
        """Oldest first, because every rank reports its steps in order."""
        self._most_open = _most_open(limits.max_open_rounds, plan.part_count)
        self._most_kept = _most_open(limits.max_open_rounds, len(plan.topology.pairs))
        self._reported_at = -math.inf
        self._last_decision: Decision | None = None
        self._known = StepSet()
        self._kept: dict[int, Decision] = {}
        """Oldest first, like the open rounds."""
        self._received = ReceivedSteps(plan.networks_of, self._before)
        self._settled = self._before

    @property
    def last_decision(self) -> Decision | None:
        """The last decision; None before the first one."""
        return self._last_decision

    @property
    def have_begun(self) -> bool:
        """Whether any rank has reported a step."""
        is_settled = self._settled > self._before
        return is_settled or any(step > self._before for step in self._step_of.values())

    @property
    def oldest(self) -> OldestRound | None:
        """The oldest open round; None if no round is open."""
        if not self._open:
            return None
        step, round_ = next(iter(self._open.items()))
        return OldestRound(step, round_.opened_at, round_.reported)

    @property
    def reported_at(self) -> float:
        """When a rank has last reported a new step."""
        return self._reported_at

    @property
    def settled(self) -> int:
        """Last settled step."""
        return self._settled

    def restore(
        self, settled: int, decisions: Iterable[Decision], steps: Iterable[int] = ()
    ) -> None:
        """Continue after these decisions, the first of which follows the settled step.

        steps: all that are written down.
        """
        self.settle(settled)
        for step in steps:
            self._known.add(step)
        for decision in decisions:
            self._keep(decision)
        if self._last_decision:
            self._step_of = dict.fromkeys(self._step_of, self._last_decision.step)

    def attach(self, rank: int, settled: int, received: int | None) -> Needs:
        """Return what is needed when a rank opens a stream. received: as in `acknowledge`."""
        self.settle(settled)
        self._received.note(rank, received)
        last = math.inf if received is None else received
        decisions = [decision for step, decision in self._kept.items() if step > last]
        missing = self._known.gaps(self._before + 1, self._settled)
        return Needs(self.step_of(rank) + 1, missing, decisions)

    def acknowledge(self, rank: int, settled: int, received: int | None) -> None:
        """Forget decisions that no rank needs again.

        received: last step whose decision the rank has; None: it needs none again.
        """
        self._received.note(rank, received)
        if settled > self._settled:
            self.settle(settled)
        _forget(self._kept, self._received.lowest)

    def settle(self, step: int) -> None:
        """Note that all steps up to this one are in rank 0's record."""
        if step <= self._settled:
            return
        self._settled = step
        _forget(self._open, step)
        _forget(self._kept, step)

    def add_settled(self, decision: Decision) -> bool:
        """Take over a decision that rank 0 has made; return whether it was missing.

        Refusal if it has not the run's pairs and finite numbers, or if there are too many gaps.
        """
        check_settled(self._plan, decision)
        if self._known.range_count > MOST_GAPS:
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"the settled decisions have more than {MOST_GAPS} gaps before step "
                f"{decision.step}",
            )
        if decision.step in self._known or decision.step <= self._before:
            return False
        self._known.add(decision.step)
        self.settle(decision.step)
        if self._last_decision is None or self._last_decision.step < decision.step:
            self._last_decision = decision
        return True

    def _keep(self, decision: Decision) -> None:
        self._last_decision = decision
        self._known.add(decision.step)
        self._kept[decision.step] = decision

    def step_of(self, rank: int) -> int:
        """Last step that a rank has reported; before its first report, the plan's step before."""
        return max(self._step_of[rank], self._settled)

    def must_wait(self, rank: int) -> bool:
        """Whether a rank is so far ahead that no more of its reports may be taken now."""
        return len(self._open) >= self._most_open and self.step_of(rank) + 1 not in self._open

    def report(
        self,
        rank: int,
        step: int,
        pairs: Mapping[Pair, PairSums],
        now: float,
        modes: Mapping[Pair, Mode] = MappingProxyType({}),
        in_force: InForce = NOTHING,
    ) -> DecidedRound | None:
        """Add one rank's sums of a step; return the decision if this report was the last needed.

        pairs: the rank's pairs in the plan's order. now: seconds. modes: see `Round`. in_force:
        what commands change, as the rank knows it. A step that the rank has reported before is
        ignored. Refusal if the step or the pairs are not the expected ones, or if the numbers are
        impossible.
        """
        self._check_step(rank, step)
        if step <= self.step_of(rank):
            return None
        round_ = self._open.get(step)
        check_report(self._plan, rank, step, pairs, round_.totals if round_ else {})
        if round_ is None:
            round_ = self._open[step] = Round(now)
        self._step_of[rank] = step
        self._reported_at = now
        round_.reported.add(rank)
        if len(round_.reported) == len(self._step_of):
            del self._open[step]
        if not pairs:
            return None
        round_.add(self._plan, rank, pairs)
        round_.modes.update(modes)
        if in_force is not NOTHING:
            round_.override(self._plan.first_pairs(rank), in_force)
        if round_.missing:
            return None
        distances = round_.distances()
        round_.totals = {}
        decision = decide(step, distances, self._rule, round_.modes, round_.in_force)
        self._keep(decision)
        return DecidedRound(decision, now - round_.opened_at)

    def _check_step(self, rank: int, step: int) -> None:
        expected = self.step_of(rank) + 1
        if not self._before < step <= expected:
            how = "goes backwards" if step < expected else "skips ahead"
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{self._ranks.describe(rank)} {how}: it reports step {step}, step {expected} is "
                "next",
            )
        if step == expected and len(self._kept) >= self._most_kept:
            raise exceeded(
                f"{self._ranks.describe(rank)} reports step {step}, but a rank has acknowledged no "
                f"decision after step {next(iter(self._kept)) - 1}",
                "max_open_rounds",
                self._most_kept,
            )


def _most_open(limit: int, parts: int) -> int:
    """Return how many rounds with so many parts may be open."""
    return max(1, limit // max(1, -(-parts // PARTS_PER_ROUND)))


def _forget(by_step: dict[int, Any], last: int | None) -> None:
    """Remove all steps up to `last` from a dictionary in their order; None removes all."""
    while by_step and (last is None or next(iter(by_step)) <= last):
        del by_step[next(iter(by_step))]
