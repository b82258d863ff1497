"""Strategies: when a teacher pauses, and what each network learns from.

A strategy is two pure functions without torch, so that the coordinator and the workers use the
same object:

* `switch(distances) -> Mode`: the rule for one pair and step;
* `kl_weights(...) -> {peer: weight}`: the KL(p_peer || p_self) terms of a network's loss.

To add one: write a class like those below and name it in `STRATEGIES`.

Not covered: losses that are no weighted sum of KL terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from switokd.decision import Decision, Mode
from switokd.gap import Distances, delta
from switokd.topology import Pair, Role, Topology


class Strategy(Protocol):
    """What the trainer and the coordinator ask of a strategy."""

    def switch(self, d: Distances) -> Mode:
        """Mode of a pair with these distances."""
        ...

    def kl_weights(
        self, network: str, topology: Topology, decision: Decision | None, weight: float
    ) -> Mapping[str, float]:
        """Weight of each KL(p_peer || p_network) in the network's loss.

        `weight` is alpha for a student and beta for a teacher. `decision` is this step's; a
        student is given None, because it does not wait for one.
        """
        ...


class SwitOKD:
    """Qian et al., ECCV 2022: a teacher that is too far ahead of its student is paused."""

    def switch(self, d: Distances) -> Mode:
        """Expert mode if G > delta and the teacher is the better one."""
        return Mode.EXPERT if d.gap > delta(d) and d.e_t < d.e_s else Mode.LEARNING

    def kl_weights(
        self, network: str, topology: Topology, decision: Decision | None, weight: float
    ) -> Mapping[str, float]:
        """All other networks, but for a teacher no student whose pair is in expert mode."""
        if topology.role(network) is Role.STUDENT:
            peers = [*topology.teachers, *topology.students]
        else:
            assert decision is not None, "a teacher waits for the decision"
            learners = [
                s for s in topology.students if decision.mode(Pair(network, s)) is Mode.LEARNING
            ]
            peers = [*learners, *topology.teachers]
        return {peer: weight for peer in peers if peer != network}


class DML:
    """Deep mutual learning (Zhang et al., CVPR 2018): nobody pauses, all are peers."""

    def switch(self, d: Distances) -> Mode:
        """Learning mode, always."""
        return Mode.LEARNING

    def kl_weights(
        self, network: str, topology: Topology, decision: Decision | None, weight: float
    ) -> Mapping[str, float]:
        """The mean over all other networks."""
        peers = [peer for peer in topology if peer != network]
        return dict.fromkeys(peers, weight / len(peers))


STRATEGIES: Mapping[str, Strategy] = {"switokd": SwitOKD(), "dml": DML()}
