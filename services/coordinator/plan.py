"""The plan of a run: its ranks, networks and pairs, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from switokd.distillation.decision import Rule
from switokd.distillation.semantics import problem as problem_of_semantics
from switokd.distillation.semantics import problem_of_strategy, rule_of
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Topology
from switokd.errors import UsageError


class Refusal(Exception):
    """A message that does not fit the run: a sentence, and the kind of mistake."""

    class Kind(Enum):
        """Named like the gRPC status codes they become."""

        INVALID_ARGUMENT = "invalid argument"
        NOT_FOUND = "not found"
        ALREADY_EXISTS = "already exists"
        FAILED_PRECONDITION = "failed precondition"

    def __init__(self, kind: Refusal.Kind, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


@dataclass(frozen=True)
class Plan:
    """What all ranks of a run must agree on.

    `ranks[i]` hold the topology's i-th network. A rank may hold several networks, and a network
    may be held by several ranks, which then each report their own samples' share.
    """

    topology: Topology
    ranks: tuple[tuple[int, ...], ...]
    strategy: str
    config_digest: str
    round_timeout: float
    strategy_kwargs: str = "{}"
    """As JSON."""
    semantics: str = "paper"

    @cached_property
    def networks_of(self) -> dict[int, tuple[str, ...]]:
        """Networks by rank, both in ascending order: of rank, and of the topology."""
        held: dict[int, list[str]] = {rank: [] for rank in sorted(set().union(*self.ranks))}
        for name, ranks in zip(self.topology, self.ranks, strict=True):
            for rank in ranks:
                held[rank].append(name)
        return {rank: tuple(names) for rank, names in held.items()}

    @cached_property
    def teachers(self) -> tuple[str, ...]:
        """The topology's teachers."""
        return self.topology.teachers

    @cached_property
    def pairs_of(self) -> dict[int, tuple[Pair, ...]]:
        """Pairs whose teacher a rank holds, by rank: what it must report, in this order."""
        pairs = self.topology.pairs
        return {
            rank: tuple(pair for pair in pairs if pair.teacher in names)
            for rank, names in self.networks_of.items()
        }

    @cached_property
    def parts_of(self) -> dict[Pair, tuple[tuple[int, int], ...]]:
        """Where to find a pair's parts: ranks, ascending, each with the place in its report."""
        return {
            pair: tuple(
                (rank, pairs.index(pair)) for rank, pairs in self.pairs_of.items() if pair in pairs
            )
            for pair in self.topology.pairs
        }

    def check(self) -> None:
        """Refuse a plan that no run can follow."""
        listed = set().union(*self.ranks)
        problem = self.topology.problem() or problem_of_semantics(self.semantics, self.topology)
        if problem:
            pass  # the topology's comes first: what follows is of its ranks
        elif not all(self.ranks):
            problem = "a network has no rank"
        elif any(sorted(set(ranks)) != list(ranks) for ranks in self.ranks):
            problem = f"a network's ranks must ascend, each once; got {list(self.ranks)}"
        elif listed != set(range(len(listed))):
            problem = f"ranks must be 0 to world size - 1, none left out; got {sorted(listed)}"
        elif not 0 < self.round_timeout < math.inf:
            problem = f"round timeout must be above 0 seconds, got {self.round_timeout}"
        if problem:
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, f"the run's plan is wrong: {problem}")

    def rule(self, strategies: Collection[str]) -> Rule:
        """How its steps are decided. strategies: import strings that may be imported."""
        try:
            kwargs = json.loads(self.strategy_kwargs or "{}")
            strategy = make_strategy(self.strategy, kwargs, strategies)
        except (UsageError, ValueError) as error:
            sentence = f"the run's plan is wrong: {error}"
            if ":" in self.strategy and self.strategy not in strategies:
                sentence = (
                    f"strategy {self.strategy} is not one that this coordinator may import: start "
                    f"it with --strategy {self.strategy}"
                )
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, sentence) from None
        if problem := problem_of_strategy(self.semantics, strategy):
            raise Refusal(Refusal.Kind.INVALID_ARGUMENT, f"the run's plan is wrong: {problem}")
        return rule_of(strategy, self.semantics, self.topology)
