"""The plan of a run: its ranks, networks, pairs and strategy.

Not covered: the plan as a wire message (`messages.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from switokd.distillation.decision import Rule
from switokd.distillation.semantics import (
    problem_of_semantics,
    problem_of_strategy,
    rule_of,
)
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Topology
from switokd.errors import UsageError
from switokd.services.coordinator.refusal import Refusal


@dataclass(frozen=True)
class Plan:
    """All settings that the ranks of a run must agree on.

    A rank may hold several networks. Several ranks may hold the same network; each of them reports
    its own shard of the batch.
    """

    topology: Topology
    ranks: tuple[tuple[int, ...], ...]
    """`ranks[i]`: ranks that hold the topology's i-th network, ascending."""
    strategy: str
    config_digest: str
    round_timeout: float
    """Seconds that an incomplete round may stay open."""
    strategy_kwargs: str = "{}"
    """Arguments of the strategy, as JSON."""
    semantics: str = "paper"
    first_step: int = 1
    """The step that every rank reports first."""

    @cached_property
    def networks_of(self) -> dict[int, tuple[str, ...]]:
        """By rank, ascending: the rank's networks in the topology's order."""
        networks: dict[int, list[str]] = {rank: [] for rank in sorted(set().union(*self.ranks))}
        for name, ranks in zip(self.topology, self.ranks, strict=True):
            for rank in ranks:
                networks[rank].append(name)
        return {rank: tuple(names) for rank, names in networks.items()}

    @cached_property
    def teachers(self) -> tuple[str, ...]:
        """The topology's teachers."""
        return self.topology.teachers

    @cached_property
    def pairs_of(self) -> dict[int, tuple[Pair, ...]]:
        """By rank: the pairs that the rank must report, in this order.

        A rank reports the pairs of every teacher that it holds.
        """
        pairs = self.topology.pairs
        return {
            rank: tuple(pair for pair in pairs if pair.teacher in names)
            for rank, names in self.networks_of.items()
        }

    @cached_property
    def parts_of(self) -> dict[Pair, tuple[tuple[int, int], ...]]:
        """By pair: (rank, index of the pair in the rank's report) of each part, ranks ascending."""
        return {
            pair: tuple(
                (rank, pairs.index(pair)) for rank, pairs in self.pairs_of.items() if pair in pairs
            )
            for pair in self.topology.pairs
        }

    def check(self) -> None:
        """Raise Refusal if no run can follow this plan."""
        if problem := self._problem():
            raise _wrong_plan(problem)

    def rule(self, strategies: Collection[str]) -> Rule:
        """Make the rule that decides the run's steps; Refusal if the strategy is wrong.

        strategies: import strings that the coordinator may import.
        """
        try:
            kwargs = json.loads(self.strategy_kwargs or "{}")
            strategy = make_strategy(self.strategy, kwargs, strategies)
        except (UsageError, ValueError) as error:
            if ":" in self.strategy and self.strategy not in strategies:
                raise Refusal(
                    Refusal.Kind.INVALID_ARGUMENT,
                    f"strategy {self.strategy} is not one that this coordinator may import: start "
                    f"it with --strategy {self.strategy}",
                ) from None
            raise _wrong_plan(str(error)) from None
        if problem := problem_of_strategy(self.semantics, strategy):
            raise _wrong_plan(problem)
        return rule_of(strategy, self.semantics, self.topology)

    def _problem(self) -> str:
        """Say what is wrong with the topology or the ranks; empty if nothing is wrong."""
        # The topology comes first, because the checks of the ranks rely on it.
        problem = self.topology.problem() or problem_of_semantics(self.semantics, self.topology)
        if problem:
            return problem
        if not all(self.ranks):
            return "a network has no rank"
        if any(sorted(set(ranks)) != list(ranks) for ranks in self.ranks):
            return f"a network's ranks must ascend, each once; got {list(self.ranks)}"
        used = set().union(*self.ranks)
        if used != set(range(len(used))):
            return f"ranks must be 0 to world size - 1, none left out; got {sorted(used)}"
        if not 0 < self.round_timeout < math.inf:
            return f"round timeout must be above 0 seconds, got {self.round_timeout}"
        return ""


def _wrong_plan(problem: str) -> Refusal:
    return Refusal(Refusal.Kind.INVALID_ARGUMENT, f"the run's plan is wrong: {problem}")
