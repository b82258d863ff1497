"""Plans, sums and small functions that several test modules of the coordinator use."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from switokd.distillation.gap import PairSums
from switokd.distillation.topology import Role, Topology
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.run import CoordinatedRun

T, S = Role.TEACHER, Role.STUDENT
PLAN = Plan(Topology((("a", T), ("b", T), ("s", S))), ((0,), (1,), (2,)), "switokd", "d", 60.0)
EXPERT = PairSums(gap=8.0, e_s=8.0, e_t=1.0, n=8)  # distances that pause the teacher
LEARNING = PairSums(gap=0.8, e_s=8.0, e_t=7.0, n=8)
EMPTY = PairSums(gap=0.0, e_s=0.0, e_t=0.0, n=0)  # a rank without samples, at a short last batch


def started(plan: Plan = PLAN) -> CoordinatedRun:
    """A run whose ranks have all joined and attached at 0 s."""
    run = CoordinatedRun("r", plan, now=0.0)
    for rank in plan.networks_of:
        run.join(rank, plan)
        run.attach(rank)
    return run


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """Kind and reason of the refusal that a call raises."""
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value.kind.name, str(caught.value)
