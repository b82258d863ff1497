"""The method of one run: its strategy, couplings and semantics combined.

Not covered: the formulas (`gap.py`, `decision.py`, `losses.py`), the strategies (`strategies/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from switokd.distillation.couplings import Couplings, Term
from switokd.distillation.decision import Decision, Rule
from switokd.distillation.semantics import pauses_by_zero, rule_of
from switokd.distillation.strategies.base import Strategy
from switokd.distillation.topology import Pair, Topology


@dataclass(frozen=True)
class Method:
    """A strategy with the couplings and the semantics of a run."""

    couplings: Couplings
    strategy: Strategy
    semantics: str = "paper"
    """"paper" or "published", see `semantics.py`."""

    @property
    def topology(self) -> Topology:
        """Networks, roles and pairs of the run."""
        return self.couplings.topology

    @cached_property
    def rule(self) -> Rule:
        """Rule that decides the run's steps."""
        return rule_of(self.strategy, self.semantics, self.topology)

    @cached_property
    def combines(self) -> bool:
        """Whether the strategy combines networks to additional peers (KDCL)."""
        return getattr(self.strategy.combine, "__func__", None) is not Strategy.combine

    @cached_property
    def is_own(self) -> bool:
        """Whether the strategy is a user's class; only such a class may draw random numbers."""
        return not type(self.strategy).__module__.startswith("switokd.")

    @cached_property
    def taus(self) -> Mapping[Pair, float]:
        """Temperature of the distances, by pair."""
        return {pair: self.couplings.tau(pair) for pair in self.topology.pairs}

    def zeroes_loss(self, teacher: str, decision: Decision) -> bool:
        """Whether the teacher's loss is multiplied by 0 in this step, instead of pausing."""
        return self._pauses_by_zero and decision.is_expert(teacher)

    @cached_property
    def _pauses_by_zero(self) -> bool:
        return pauses_by_zero(self.semantics, self.topology)

    def terms(self, network: str, decision: Decision | None) -> Sequence[Term]:
        """KL terms of a network's loss; `decision` is None for a student."""
        return self.strategy.terms(network, self.couplings, decision)
