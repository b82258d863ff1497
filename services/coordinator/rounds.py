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
from typing import NamedTuple

from switokd.distillation.decision import Decision, Mode, Rule, decide
from switokd.distillation.gap import PairSums
from switokd.distillation.topology import Pair
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.ranks import Ranks
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.steps import StepRange, StepSet


@dataclass
class Round:
    """Reports of one step."""

    opened_at: float
    reported: set[int] = field(default_factory=set)
    """Ranks that have reported."""
    sums: dict[int, tuple[PairSums, ...]] = field(default_factory=dict)
    """By rank that holds a teacher: the sums of its pairs, in the plan's order."""
    modes: dict[Pair, Mode] = field(default_factory=dict)
    """Modes that a teacher's first rank has chosen, where rounding matters."""


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

    def __init__(self, plan: Plan, ranks: Ranks, rule: Rule) -> None:
        self._plan = plan
        self._ranks = ranks
        self._rule = rule
        self._reports_needed = sum(1 for pairs in plan.pairs_of.values() if pairs)
        self._before = plan.first_step - 1
        self._step_of = dict.fromkeys(plan.networks_of, self._before)
        self._open: dict[int, Round] = {}
        self._reported_at = -math.inf
        self._last_decision: Decision | None = None
        self._known = StepSet()
        self._kept: dict[int, Decision] = {}
        self._received: dict[int, int | None] = dict.fromkeys(plan.networks_of, self._before)
        self._settled = self._before

    @property
    def last_decision(self) -> Decision | None:
        """The last decision; None before the first one."""
        return self._last_decision

    @property
    def have_begun(self) -> bool:
        """Whether any rank has reported a step."""
        return any(step > self._before for step in self._step_of.values())

    @property
    def oldest(self) -> OldestRound | None:
        """The oldest open round; None if no round is open."""
        if not self._open:
            return None
        step, round_ = min(self._open.items())
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
        self._received[rank] = received
        last = math.inf if received is None else received
        decisions = [decision for step, decision in self._kept.items() if step > last]
        missing = self._known.gaps(self._before + 1, self._settled)
        return Needs(self._step_of[rank] + 1, missing, decisions)

    def acknowledge(self, rank: int, settled: int, received: int | None) -> None:
        """Forget decisions that no rank needs again.

        received: last step whose decision the rank has; None: it needs none again.
        """
        self._received[rank] = received
        if settled > self._settled:
            self.settle(settled)
        low = min((step for step in self._received.values() if step is not None), default=None)
        while self._kept and (low is None or next(iter(self._kept)) <= low):
            del self._kept[next(iter(self._kept))]

    def settle(self, step: int) -> None:
        """Note that all steps up to this one are in rank 0's record."""
        if step <= self._settled:
            return
        self._settled = step
        self._step_of = {rank: max(last, step) for rank, last in self._step_of.items()}
        self._open = {s: round_ for s, round_ in self._open.items() if s > step}
        self._kept = {s: decision for s, decision in self._kept.items() if s > step}

    def add_settled(self, decision: Decision) -> bool:
        """Take over a decision that rank 0 has made; return whether it was missing."""
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
        return self._step_of[rank]

    def report(
        self,
        rank: int,
        step: int,
        pairs: Mapping[Pair, PairSums],
        now: float,
        modes: Mapping[Pair, Mode] = MappingProxyType({}),
    ) -> DecidedRound | None:
        """Add one rank's sums of a step; return the decision if this report was the last needed.

        pairs: the rank's pairs in the plan's order. now: seconds. modes: see `Round`. A step that
        the rank has reported before is ignored. Refusal if the step or the pairs are not the
        expected ones, or if the sums are impossible.
        """
        self._check_step(rank, step)
        if step <= self._step_of[rank]:
            return None
        round_ = self._open.get(step)
        self._check_pairs(rank, step, pairs, round_)
        if round_ is None:
            round_ = self._open[step] = Round(now)
        self._step_of[rank] = step
        self._reported_at = now
        round_.reported.add(rank)
        if len(round_.reported) == len(self._step_of):
            del self._open[step]
        if not pairs:
            return None
        round_.sums[rank] = tuple(pairs.values())
        round_.modes.update(modes)
        if len(round_.sums) < self._reports_needed:
            return None
        distances = {
            pair: _add(round_.sums[r][i] for r, i in parts).mean()
            for pair, parts in self._plan.parts_of.items()
        }
        decision = decide(step, distances, self._rule, round_.modes)
        self._keep(decision)
        return DecidedRound(decision, now - round_.opened_at)

    def _check_step(self, rank: int, step: int) -> None:
        expected = self._step_of[rank] + 1
        if not self._before < step <= expected:
            how = "goes backwards" if step < expected else "skips ahead"
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{self._ranks.describe(rank)} {how}: it reports step {step}, step {expected} is "
                "next",
            )

    def _check_pairs(
        self, rank: int, step: int, pairs: Mapping[Pair, PairSums], round_: Round | None
    ) -> None:
        expected = self._plan.pairs_of[rank]
        if tuple(pairs) != expected:
            wanted = [f"{p.teacher}-{p.student}" for p in expected] or ["none"]
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"{self._ranks.describe(rank)} must report the pairs {', '.join(wanted)} at step "
                f"{step}",
            )
        for pair, sums in pairs.items():
            # The L1 distance of two distributions is at most 2; float32 may round it up. The
            # comparison also refuses NaN. The sums of a rank without samples are zero.
            limit = 2 * sums.n * (1 + 1e-5)
            if not (0 <= sums.gap <= limit and 0 <= sums.e_s <= limit and 0 <= sums.e_t <= limit):
                raise Refusal(
                    Refusal.Kind.INVALID_ARGUMENT,
                    f"{self._ranks.describe(rank)} reports distances that are not finite sums of "
                    f"at most 2 per sample for {pair.teacher} and {pair.student} at step {step}: "
                    f"{sums}",
                )
            if sums.n == 0 and self._all_others_empty(rank, pair, round_):
                raise Refusal(
                    Refusal.Kind.INVALID_ARGUMENT,
                    f"{self._ranks.describe(rank)} is the last to report n=0 samples for "
                    f"{pair.teacher} and {pair.student} at step {step}: some rank must have some",
                )

    def _all_others_empty(self, rank: int, pair: Pair, round_: Round | None) -> bool:
        """Whether all other ranks of this pair have reported, and none of them has a sample."""
        sums = round_.sums if round_ else {}
        others = [(r, i) for r, i in self._plan.parts_of[pair] if r != rank]
        return all(r in sums and sums[r][i].n == 0 for r, i in others)


def _add(parts: Iterable[PairSums]) -> PairSums:
    """Add sums in the given order in float64, so that the result is always the same.

    `PairSums.__add__` would make one object per rank, which is slower.
    """
    gap = e_s = e_t = 0.0
    n = 0
    for part in parts:
        gap += part.gap
        e_s += part.e_s
        e_t += part.e_t
        n += part.n
    return PairSums(gap, e_s, e_t, n)
