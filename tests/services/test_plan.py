"""A plan with many pairs and ranks: what is computed of it grows with its size, not faster."""

from __future__ import annotations

import time

from switokd.distillation.topology import Pair, Topology
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.received import ReceivedSteps
from tests.services.examples import S, T


def wide(networks: int, ranks: int) -> Plan:
    """A plan with half of the networks as teachers, all of them on all ranks."""
    half = networks // 2
    roles = tuple((f"n{i}", T if i < half else S) for i in range(networks))
    off = frozenset({Pair("n0", f"n{half}")})
    every = (tuple(range(ranks)),) * networks
    return Plan(Topology(roles, off), every, "switokd", "d", 60.0)


def test_parts_are_those_that_each_rank_reports() -> None:
    roles = (("a", T), ("s", S), ("b", T), ("u", S))
    ranks = ((1, 2), (0, 2), (0, 2), (3,))
    plan = Plan(Topology(roles, frozenset({Pair("b", "u")})), ranks, "switokd", "d", 60.0)
    plan.prepare()
    a_s, a_u, b_s = plan.topology.pairs
    assert plan.pairs_of == {0: (b_s,), 1: (a_s, a_u), 2: (a_s, a_u, b_s), 3: ()}
    assert plan.places_of == {0: (0,), 1: (0, 0), 2: (1, 1, 1), 3: ()}
    assert plan.part_counts == {a_s: 2, a_u: 2, b_s: 2}
    assert [plan.first_pairs(rank) for rank in range(4)] == [{b_s}, {a_s, a_u}, set(), set()]
    assert plan.part_count == 6


def test_a_wide_plan_takes_linear_time() -> None:
    plan = wide(networks=120, ranks=4)  # 3,599 pairs; they took 5.6 s when this was quadratic
    began = time.perf_counter()
    plan.prepare()
    assert plan.part_count == 3599 * 4
    assert time.perf_counter() - began < 1.0


def test_the_lowest_received_step_is_that_of_the_slowest_rank() -> None:
    received = ReceivedSteps(range(3), 0)
    assert received.lowest == 0
    for rank, step, lowest in (
        (0, 5, 0),
        (1, 3, 0),
        (2, 4, 3),
        (1, 9, 4),
        (1, 2, 2),  # a new stream of a process that has lost decisions
        (1, None, 4),
        (2, None, 5),
        (0, None, None),
        (2, 7, 7),
        (0, 7, 7),
        (2, 8, 7),
        (0, 8, 8),
    ):
        received.note(rank, step)
        assert received.lowest == lowest, (rank, step)
