"""Where the paper and its published code differ, and which of the two a run follows.

`paper`: the formulas. `published`: the released training scripts of the paper's table 7, so that a
difference from the printed tables can be traced:

* 2T1S: the second teacher's epsilon is made of the first teacher's distances;
* 1T2S: the first student's epsilon is made of the second student's distances;
* 1T2S: a teacher in expert mode with both students is not paused. Its loss is multiplied by 0 and
  goes through backward and update, so that momentum and weight decay go on moving it.

1T1S is the same in both. Strategies that do not switch have no published semantics.

Torch-free; the coordinator uses it.

Not covered: temperatures, which are all 1 in the scripts; their learning rates (in the recipes).
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
    """Why a run cannot follow these semantics, in a sentence; empty if it can."""
    if semantics not in SEMANTICS:
        return f"semantics must be one of {', '.join(SEMANTICS)}, got {semantics!r}"
    is_whole = topology.name in PUBLISHED_FOR and not topology.off
    if semantics == "published" and not is_whole:
        return (
            f"semantics published is there for {', '.join(PUBLISHED_FOR)} with all pairs on, as "
            f"the released code is; this run is {topology.name}"
        )
    return ""


def problem_of_strategy(semantics: str, strategy: Strategy) -> str:
    """Why a run with this strategy cannot follow these semantics; empty if it can."""
    if semantics == "published" and not isinstance(strategy, SwitOKD):
        return (
            "semantics published is there for the strategies switokd and threshold alone, for "
            "only switching differs in the released code; use distillation.semantics=paper"
        )
    return ""


def rule_of(strategy: Strategy, semantics: str, topology: Topology) -> Rule:
    """How a run's steps are decided, by its workers and its coordinator alike."""
    epsilons = epsilon_from(semantics, topology)
    pauses = not pauses_by_zero(semantics, topology)
    return Rule(strategy.switch, epsilons, strategy.fixed_delta, pauses)


def epsilon_from(semantics: str, topology: Topology) -> Mapping[Pair, Pair]:
    """By pair, the other pair whose distances make its epsilon; a pair not named uses its own."""
    if semantics == "paper" or topology.name == "1T1S":
        return {}
    first, second = topology.pairs
    return {second: first} if topology.name == "2T1S" else {first: second}


def pauses_by_zero(semantics: str, topology: Topology) -> bool:
    """Whether a teacher in expert mode goes on with a loss multiplied by 0 instead of pausing."""
    return semantics == "published" and topology.name == "1T2S"
