"""The rounds of one run: the ranks' reports in, decisions out.

A *round* is one step. The first report of the step opens the round. The round is decided when every
rank that holds a teacher has reported, and complete when all ranks have reported. A report of a
rank without teachers has no pairs and shows that the rank is alive.

Reports of one rank come in the order of steps, but a rank without teachers may lag behind.
Therefore several rounds may be open.

Not covered: rounds from before a restart of the coordinator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from switokd.distillation.decision import Decision, Rule, decide
from switokd.distillation.gap import PairSums
from switokd.distillation.topology import Pair
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.ranks import Ranks
from switokd.services.coordinator.refusal import Refusal


@dataclass
class Round:
    """Reports of one step."""

    opened_at: float
    reported: set[int] = field(default_factory=set)
    """Ranks that have reported."""
    sums: dict[int, tuple[PairSums, ...]] = field(default_factory=dict)
    """By rank that holds a teacher: the sums of its pairs, in the plan's order."""


class OldestRound(NamedTuple):
    """Oldest round that is not complete."""

    step: int
    opened_at: float
    reported: Set[int]


class DecidedRound(NamedTuple):
    """A step's decision. duration: seconds from the round's first report to the decision."""

    decision: Decision
    duration: float


class Rounds:
    """Open rounds of one run, and its last decision. A refused report changes nothing."""

    def __init__(self, plan: Plan, ranks: Ranks, rule: Rule) -> None:
        self._plan = plan
        self._ranks = ranks
        self._rule = rule
        self._reports_needed = sum(1 for pairs in plan.pairs_of.values() if pairs)
        self._before = plan.first_step - 1
        self._step_of = dict.fromkeys(plan.networks_of, self._before)
        self._open: dict[int, Round] = {}
        self._last_decision: Decision | None = None

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

    def step_of(self, rank: int) -> int:
        """Last step that a rank has reported; before its first report, the plan's step before."""
        return self._step_of[rank]

    def report(
        self, rank: int, step: int, pairs: Mapping[Pair, PairSums], now: float
    ) -> DecidedRound | None:
        """Add one rank's sums of a step; return the decision if this report was the last needed.

        pairs: the rank's pairs in the plan's order. now: seconds. Refusal if the step or the pairs
        are not the expected ones, or if the sums are impossible.
        """
        self._check_step(rank, step)
        round_ = self._open.get(step)
        self._check_pairs(rank, step, pairs, round_)
        if round_ is None:
            round_ = self._open[step] = Round(now)
        self._step_of[rank] = step
        round_.reported.add(rank)
        if len(round_.reported) == len(self._step_of):
            del self._open[step]
        if not pairs:
            return None
        round_.sums[rank] = tuple(pairs.values())
        if len(round_.sums) < self._reports_needed:
            return None
        distances = {
            pair: _add(round_.sums[r][i] for r, i in parts).mean()
            for pair, parts in self._plan.parts_of.items()
        }
        self._last_decision = decision = decide(step, distances, self._rule)
        return DecidedRound(decision, now - round_.opened_at)

    def _check_step(self, rank: int, step: int) -> None:
        expected = self._step_of[rank] + 1
        if step != expected:
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
