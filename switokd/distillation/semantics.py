"""Differences between the paper and its published code; a run follows one of the two.

Semantics `paper` follows the formulas. Semantics `published` follows the released training scripts
of the paper's table 7, so that differences from the printed results can be traced:

* 2T1S: epsilon of the second teacher's pair is computed from the first teacher's distances;
* 1T2S: epsilon of the first student's pair is computed from the second student's distances;
* 1T2S: a teacher in expert mode with both students does not pause. Its loss is multiplied by 0,
  but backward pass and optimizer step still run: momentum and weight decay change its weights.

1T1S is the same in both. Strategies that do not switch have no published semantics.

Not covered: the scripts' temperatures, which are all 1; their learning rates, see the recipes.
"""

from __future__ import annotations

from collections.abc import Mapping

from switokd.distillation.decision import Rule
from switokd.distillation.strategies.base import Strategy
from switokd.distillation.strategies.switching import SwitOKD
from switokd.distillation.topology import Pair, Topology

SEMANTICS = ("paper", "published")
PUBLISHED_FOR = ("1T1S", "2T1S", "1T2S")


def problem_of_semantics(semantics: str, topology: Topology) -> str:
    """An error message if a run with this topology cannot follow the semantics, else empty."""
    if semantics not in SEMANTICS:
        return f"semantics must be one of {', '.join(SEMANTICS)}, got {semantics!r}"
    is_whole = topology.name in PUBLISHED_FOR and not topology.off
    if semantics == "published" and not is_whole:
        return (
            f"semantics published exists only for {', '.join(PUBLISHED_FOR)} with all pairs on, "
            f"like the released code; this run is {topology.name}"
        )
    return ""


def problem_of_strategy(semantics: str, strategy: Strategy) -> str:
    """An error message if a run with this strategy cannot follow the semantics, else empty."""
    if semantics == "published" and not isinstance(strategy, SwitOKD):
        return (
            "semantics published exists only for the strategies switokd and threshold, because "
            "the released code differs only in the switching; use distillation.semantics=paper"
        )
    return ""


def rule_of(strategy: Strategy, semantics: str, topology: Topology) -> Rule:
    """Rule that decides the steps of a run, in its workers and in its coordinator."""
    epsilons = epsilon_from(semantics, topology)
    pauses = not pauses_by_zero(semantics, topology)
    return Rule(strategy.switch, epsilons, strategy.fixed_delta, pauses)


def epsilon_from(semantics: str, topology: Topology) -> Mapping[Pair, Pair]:
    """Pairs whose epsilon is computed from another pair's distances, mapped to that pair."""
    if semantics == "paper" or topology.name == "1T1S":
        return {}
    first, second = topology.pairs
    return {second: first} if topology.name == "2T1S" else {first: second}


def pauses_by_zero(semantics: str, topology: Topology) -> bool:
    """Whether a teacher in expert mode multiplies its loss by 0 instead of pausing."""
    return semantics == "published" and topology.name == "1T2S"
