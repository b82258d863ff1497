"""The method as one run uses it: who teaches whom, how strongly, and what is decided by which rule.

Torch-free. Not covered: the formulas (`gap.py`, `decision.py`, `losses.py`), the strategies
themselves (`strategies/`).
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
    """A strategy with all that it is told."""

    couplings: Couplings
    strategy: Strategy
    semantics: str = "paper"

    @property
    def topology(self) -> Topology:
        """Networks, roles and pairs."""
        return self.couplings.topology

    @cached_property
    def rule(self) -> Rule:
        """How a step is decided."""
        return rule_of(self.strategy, self.semantics, self.topology)

    @cached_property
    def combines(self) -> bool:
        """Whether there are peers beside the networks."""
        return getattr(self.strategy.combine, "__func__", None) is not Strategy.combine

    @cached_property
    def taus(self) -> Mapping[Pair, float]:
        """Temperature of each pair's distances."""
        return {pair: self.couplings.tau(pair) for pair in self.topology.pairs}

    def zeroes_loss(self, teacher: str, decision: Decision) -> bool:
        """Whether a teacher goes through backward and update with a loss of 0."""
        return self._pauses_by_zero and decision.is_expert(teacher)

    @cached_property
    def _pauses_by_zero(self) -> bool:
        return pauses_by_zero(self.semantics, self.topology)

    def terms(self, network: str, decision: Decision | None) -> Sequence[Term]:
        """The KL terms of a network's loss; a student's decision is None."""
        return self.strategy.terms(network, self.couplings, decision)
