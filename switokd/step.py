"""One training step of one network. This is the whole of it.

Symbols as in the paper: z are logits `[B, C]`, y labels `[B]`, tau the temperature, alpha and
beta the weights of the KL terms in a student's and a teacher's loss.

Not covered: where the batch comes from, logging, evaluation (`train.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from switokd.decision import Decision
from switokd.gap import PairSums, pair_sums
from switokd.objective import objective
from switokd.strategy import Strategy
from switokd.topology import Pair, Topology

Exchange = Callable[[int, Tensor, Tensor], Mapping[str, Tensor]]
"""(step, z, y) -> every network's logits, by name."""


class Decider(Protocol):
    """Who adds up the distances and decides."""

    def report(self, step: int, pairs: Mapping[Pair, PairSums]) -> None:
        """Hand in this rank's part of a step."""

    def decision(self, step: int) -> Decision:
        """Wait for the step's decision."""
        ...


@dataclass(frozen=True)
class Learner:
    """One network with all that its step needs."""

    name: str
    model: nn.Module
    optimizer: Optimizer
    topology: Topology
    strategy: Strategy
    tau: float
    kl_weight: float
    """alpha for a student, beta for a teacher."""

    @property
    def pairs(self) -> list[Pair]:
        """A teacher's pairs; a student has none of its own."""
        return [pair for pair in self.topology.pairs if pair.teacher == self.name]


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind for whoever watches. `loss` is None for a paused teacher."""

    logits: Mapping[str, Tensor]
    loss: Tensor | None


def train_step(
    learner: Learner, step: int, x: Tensor, y: Tensor, exchange: Exchange, decider: Decider
) -> StepResult:
    """Train `learner` on one batch: images x `[B, ...]`, labels y `[B]`."""
    # Forward, in train mode also when paused, so that BatchNorm's statistics keep moving.
    z = learner.model(x)
    logits = exchange(step, z, y)  # every network's, detached, before anybody updates

    # A teacher measures its distance to each student. A student's report only says it is here.
    tau = learner.tau
    distances = {
        pair: pair_sums(z_t=logits[pair.teacher], z_s=logits[pair.student], y=y, tau=tau)
        for pair in learner.pairs
    }
    decider.report(step, distances)

    # Only a teacher needs the decision: a student's loss does not depend on it.
    decision = decider.decision(step) if distances else None
    if decision is not None and learner.name in decision.paused:
        return StepResult(logits, loss=None)  # weights, momentum, weight decay: all untouched

    kl_weights = learner.strategy.kl_weights(
        learner.name, learner.topology, decision, learner.kl_weight
    )
    loss = objective(z, y, logits, kl_weights, tau)
    learner.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    learner.optimizer.step()
    return StepResult(logits, loss.detach())
