"""Strategies without switching: vanilla, deep mutual learning and knowledge distillation.

Not covered: combined teachers (`kdcl.py`).
"""

from __future__ import annotations

from switokd.distillation.couplings import Couplings, Term
from switokd.distillation.decision import Decision, Mode
from switokd.distillation.gap import Distances
from switokd.distillation.strategies.base import Strategy, all_peers
from switokd.distillation.topology import Role


class Vanilla(Strategy):
    """Every network trains alone, with cross-entropy only: the paper's baseline "vanilla"."""


class DML(Strategy):
    """Deep mutual learning (Zhang et al., CVPR 2018): every network learns from all others."""

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> list[Term]:
        """One KL term per peer; the weights are divided by the number of peers."""
        peers = all_peers(network, couplings)
        return couplings.terms(network, peers, divisor=len(peers))


class KD(Strategy):
    """Knowledge distillation (Hinton et al., 2015): students learn from frozen teachers."""

    pauses = True
    frozen_teachers = True

    def switch(self, d: Distances, delta: float) -> Mode:
        """Always expert mode."""
        return Mode.EXPERT

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> list[Term]:
        """One KL term per teacher for a student, none for a teacher."""
        if couplings.topology.role(network) is Role.TEACHER:
            return []
        return couplings.terms(network, couplings.peers(network, Role.TEACHER))
