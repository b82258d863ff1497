"""What each network may learn from each other one: the weight and temperature of their KL term.

    weight   alpha where a student learns, beta where a teacher does
    tau      temperature: of the KL term, and of the distances that a pair is switched on

Settings of a pair count before those of the network that learns, and these before the run's.
Distances of a pair are taken at the temperature at which its student learns from its teacher.

Torch-free. Not covered: which of the terms a strategy uses (`strategies/`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from switokd.distillation.topology import Pair, Role, Topology


@dataclass(frozen=True)
class Coupling:
    """weight * tau^2 * KL(p_peer || p_self), p softened by tau."""

    weight: float = 1.0
    tau: float = 1.0


@dataclass(frozen=True)
class Term:
    """One KL term of a network's loss: the coupling, and the peer that is learned from."""

    peer: str
    weight: float
    tau: float


@dataclass(frozen=True)
class Couplings:
    """All couplings of a run: a default for each network, and exceptions for single pairs."""

    topology: Topology
    by_network: Mapping[str, Coupling] = field(default_factory=dict)
    exceptions: Mapping[tuple[str, str], Coupling] = field(default_factory=dict)
    """By (network that learns, peer)."""

    def of(self, network: str, peer: str) -> Coupling:
        """How `network` learns from `peer`, which may be none of the run's (a combination)."""
        return self.exceptions.get((network, peer)) or self.by_network.get(network, Coupling())

    def peers(self, network: str, role: Role) -> list[str]:
        """Networks of this role that `network` may learn from, in the topology's order."""
        names = self.topology.teachers if role is Role.TEACHER else self.topology.students
        return [peer for peer in names if peer != network and not self.is_off(network, peer)]

    def is_off(self, a: str, b: str) -> bool:
        """Whether two networks are a pair that is switched off."""
        return bool({Pair(a, b), Pair(b, a)} & self.topology.off)

    def terms(self, network: str, peers: Iterable[str], divisor: int = 1) -> list[Term]:
        """A term for each peer, its weight divided by `divisor`."""
        found = ((peer, self.of(network, peer)) for peer in peers)
        return [Term(peer, c.weight / divisor, c.tau) for peer, c in found]

    def tau(self, pair: Pair) -> float:
        """Temperature of a pair's distances."""
        return self.of(pair.student, pair.teacher).tau
