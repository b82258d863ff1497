"""Which rank holds which network: a table, and nothing else knows it.

Not covered yet: a network over several ranks, every network on every rank. The step, the
exchange and the coordinator read the table and need not change for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from switokd.topology import Topology


@dataclass(frozen=True)
class Placement:
    """`network_of[rank]` is the name of the network that the rank holds."""

    network_of: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.network_of)

    def ranks_of(self, network: str) -> tuple[int, ...]:
        """Ranks that hold `network`, ascending."""
        return tuple(rank for rank, name in enumerate(self.network_of) if name == network)


def dedicated(topology: Topology) -> Placement:
    """One rank per network, in the run file's order."""
    return Placement(tuple(topology))
