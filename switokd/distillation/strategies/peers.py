"""Strategies without switching: each network alone, all as peers, or a teacher that stays fixed."""

from __future__ import annotations

from switokd.distillation.couplings import Couplings, Term
from switokd.distillation.decision import Decision, Mode
from switokd.distillation.gap import Distances
from switokd.distillation.strategies.base import Strategy, all_peers
from switokd.distillation.topology import Role


class Vanilla(Strategy):
    """Each network alone: cross-entropy only. The base class as it is, under the tables' name."""


class DML(Strategy):
    """Deep mutual learning (Zhang et al., CVPR 2018): nobody pauses, all are peers."""

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> list[Term]:
        """The mean over all other networks."""
        peers = all_peers(network, couplings)
        return couplings.terms(network, peers, divisor=len(peers))


class KD(Strategy):
    """Knowledge distillation (Hinton et al., 2015): trained teachers, frozen; students learn."""

    pauses = True
    frozen_teachers = True

    def switch(self, d: Distances, delta: float) -> Mode:
        """Expert mode throughout."""
        return Mode.EXPERT

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> list[Term]:
        """A student's teachers."""
        if couplings.topology.role(network) is Role.TEACHER:
            return []
        return couplings.terms(network, couplings.peers(network, Role.TEACHER))
