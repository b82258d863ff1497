"""Strategies that pause a teacher when the gap to its student is too large.

Source: Qian et al., ECCV 2022, arXiv:2209.04996.

Not covered: the adaptive threshold (`gap.py`), published semantics (`semantics.py`).
"""

from __future__ import annotations

from switokd.distillation.couplings import Couplings, Term
from switokd.distillation.decision import Decision, Mode
from switokd.distillation.gap import Distances
from switokd.distillation.strategies.base import Strategy
from switokd.distillation.topology import Pair, Role


class SwitOKD(Strategy):
    """The paper's method: switching on the adaptive threshold delta."""

    pauses = True

    def switch(self, d: Distances, delta: float) -> Mode:
        """Expert mode if G > delta and e_t < e_s, else learning mode."""
        return Mode.EXPERT if d.gap > delta and d.e_t < d.e_s else Mode.LEARNING

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> list[Term]:
        """One KL term per peer; a teacher skips the students whose pair is in expert mode."""
        teachers, students = (couplings.peers(network, role) for role in Role)
        if couplings.topology.role(network) is Role.STUDENT:
            return couplings.terms(network, [*teachers, *students])
        assert decision is not None, "a teacher's terms need the decision"
        learners = [s for s in students if decision.mode(Pair(network, s)) is Mode.LEARNING]
        return couplings.terms(network, [*learners, *teachers])


class Threshold(SwitOKD):
    """The paper's ablation: switching on a fixed threshold `delta`, from 0 to 2."""

    def __init__(self, delta: float) -> None:
        is_number = isinstance(delta, (int, float)) and not isinstance(delta, bool)
        if not (is_number and 0 <= delta <= 2):
            raise ValueError(f"delta is an L1 distance, from 0 to 2, got {delta!r}")
        self.fixed_delta = float(delta)
