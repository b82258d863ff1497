"""Weight and temperature of each KL term: how strongly one network learns from another.

    weight   alpha if a student learns, beta if a teacher learns
    tau      temperature of the KL term and of the pair's distances

A pair's own settings override the network's, and the network's override the run's. A pair's
distances use the temperature at which its student learns from its teacher.

Not covered: which terms a strategy uses (`strategies/`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from switokd.distillation.topology import Pair, Role, Topology


@dataclass(frozen=True)
class Coupling:
    """Factors of the KL term weight * tau^2 * KL(p_peer || p_self), with p softened by tau."""

    weight: float = 1.0
    tau: float = 1.0


@dataclass(frozen=True)
class Term:
    """One KL term of a network's loss: the peer to learn from, its weight and temperature."""

    peer: str
    weight: float
    tau: float


@dataclass(frozen=True)
class Couplings:
    """How each network of a run learns from each of its peers."""

    topology: Topology
    by_network: Mapping[str, Coupling] = field(default_factory=dict)
    """Default coupling of each learning network."""
    exceptions: Mapping[tuple[str, str], Coupling] = field(default_factory=dict)
    """Couplings that differ from the default, by (learning network, peer)."""

    def of(self, network: str, peer: str) -> Coupling:
        """How `network` learns from `peer`. A peer may be a combination of networks (KDCL)."""
        return self.exceptions.get((network, peer)) or self.by_network.get(network, Coupling())

    def peers(self, network: str, role: Role) -> list[str]:
        """Networks with this role that `network` may learn from, in the topology's order."""
        names = self.topology.teachers if role is Role.TEACHER else self.topology.students
        return [peer for peer in names if peer != network and not self.is_off(network, peer)]

    def is_off(self, a: str, b: str) -> bool:
        """Whether two networks are a pair that the run file switches off."""
        return bool({Pair(a, b), Pair(b, a)} & self.topology.off)

    def terms(self, network: str, peers: Iterable[str], divisor: int = 1) -> list[Term]:
        """One term per peer, with the coupling's weight divided by `divisor`."""
        couplings = ((peer, self.of(network, peer)) for peer in peers)
        return [Term(peer, c.weight / divisor, c.tau) for peer, c in couplings]

    def tau(self, pair: Pair) -> float:
        """Temperature of a pair's distances."""
        return self.of(pair.student, pair.teacher).tau
