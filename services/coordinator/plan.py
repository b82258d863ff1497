"""The plan of a run: its ranks, networks, pairs and strategy.

Not covered: the plan as a wire message (`messages.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
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
from switokd.services.coordinator.text import listed

LAST_STEP = 2**62
"""No run gets as far; a later step is a mistake, and might not fit into the journal."""


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

    def describe(self, rank: int) -> str:
        """Name a rank with its networks: "rank 1 (teacher2, student)"."""
        names = self.networks_of.get(rank, ())  # none: of a rank that the run does not have
        return f"rank {rank} ({listed(list(names))})" if names else f"rank {rank}"

    @cached_property
    def teachers(self) -> tuple[str, ...]:
        """The topology's teachers."""
        return self.topology.teachers

    @cached_property
    def pairs_of(self) -> dict[int, tuple[Pair, ...]]:
        """By rank: the pairs that the rank must report, in this order.

        A rank reports the pairs of every teacher that it holds. Ranks with the same networks have
        the same tuple.
        """
        by_teacher: dict[str, list[Pair]] = {}
        for pair in self.topology.pairs:
            by_teacher.setdefault(pair.teacher, []).append(pair)
        of_names = {
            names: tuple(pair for name in names for pair in by_teacher.get(name, ()))
            for names in dict.fromkeys(self.networks_of.values())
        }
        return {rank: of_names[names] for rank, names in self.networks_of.items()}

    @cached_property
    def part_counts(self) -> dict[Pair, int]:
        """By pair, in the topology's order: the number of ranks that report it."""
        ranks_of = dict(zip(self.topology, self.ranks, strict=True))
        return {pair: len(ranks_of[pair.teacher]) for pair in self.topology.pairs}

    @cached_property
    def part_count(self) -> int:
        """Number of parts of a step: pairs, each counted once per rank that reports it."""
        return sum(self.part_counts.values())

    @cached_property
    def places_of(self) -> dict[int, tuple[int, ...]]:
        """By rank: the rank's place among the ranks of each of its pairs; ranks ascend."""
        places: dict[int, list[int]] = {rank: [] for rank in self.networks_of}
        next_place = dict.fromkeys(self.topology.pairs, 0)
        for rank, pairs in self.pairs_of.items():
            for pair in pairs:
                places[rank].append(next_place[pair])
                next_place[pair] += 1
        return {rank: tuple(of_rank) for rank, of_rank in places.items()}

    def first_pairs(self, rank: int) -> set[Pair]:
        """Return the pairs whose first rank this is."""
        places = zip(self.pairs_of[rank], self.places_of[rank], strict=True)
        return {pair for pair, place in places if place == 0}

    def check(self) -> None:
        """Raise Refusal if no run can follow this plan."""
        if self._problem:
            raise _wrong_plan(self._problem)

    def prepare(self) -> None:
        """Compute now what a run needs, in a thread of the caller's choice; see `check`."""
        self.check()
        _ = self.places_of, self.part_count

    def rule(self, strategies: Collection[str]) -> Rule:
        """Make the rule that decides the run's steps; Refusal if the strategy is wrong.

        strategies: import strings that the coordinator may import.
        """
        try:
            kwargs = json.loads(self.strategy_kwargs or "{}")
            if not isinstance(kwargs, dict):
                raise ValueError("the arguments of the strategy must be a JSON object")
            strategy = make_strategy(self.strategy, kwargs, strategies)
        except (UsageError, ValueError, RecursionError) as error:
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

    @cached_property
    def _problem(self) -> str:
        """What is wrong with the topology or the ranks; empty if nothing is wrong."""
        # The topology comes first, because the checks of the ranks rely on it.
        problem = self.topology.problem() or problem_of_semantics(self.semantics, self.topology)
        if problem:
            return problem
        if not all(self.ranks):
            return "a network has no rank"
        if any(sorted(set(ranks)) != list(ranks) for ranks in self.ranks):
            return f"a network's ranks must ascend, each once; got {_start_of(self.ranks)}"
        used = set().union(*self.ranks)
        if used != set(range(len(used))):
            found = _start_of(sorted(used))
            return f"ranks must be 0 to world size - 1, none left out; got {found}"
        if not 1 <= self.first_step <= LAST_STEP:
            return f"the first step must be 1 or later, got {self.first_step}"
        if not 0 < self.round_timeout < math.inf:
            return f"round timeout must be above 0 seconds, got {self.round_timeout}"
        return ""


def _start_of(values: Sequence[object]) -> str:
    """Return a list as text, the first twenty values of it."""
    more = ", ..." if len(values) > 20 else ""
    return f"[{', '.join(map(str, values[:20]))}{more}]"


def _wrong_plan(problem: str) -> Refusal:
    return Refusal(Refusal.Kind.INVALID_ARGUMENT, f"the run's plan is wrong: {problem}")
