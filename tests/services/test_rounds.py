"""Rounds of a run without a server: reports in, decisions out, refused reports."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest

from switokd.distillation.decision import Decision, Mode, PairDecision
from switokd.distillation.gap import PairSums
from switokd.distillation.topology import Pair, Topology
from switokd.services.coordinator.plan import Plan
from tests.services.examples import EMPTY, EXPERT, LEARNING, PLAN, S, T, refusal, started

# "b" alone is on rank 0, "a" and "s" are on rank 1, and all three are on ranks 2 and 3.
MIXED = Plan(
    Topology((("a", T), ("b", T), ("s", S))),
    ((1, 2, 3), (0, 2, 3), (1, 2, 3)),
    *("switokd", "d", 60.0),
)


def test_decides_when_the_last_teacher_has_reported_in_any_order() -> None:
    run = started()
    assert run.report(1, 1, {Pair("b", "s"): LEARNING}, now=5.0) is None
    assert run.report(2, 1, {}, now=5.5) is None
    decided = run.report(0, 1, {Pair("a", "s"): EXPERT}, now=7.0)
    assert decided is not None
    assert decided.duration == 2.0
    assert [p.mode for p in decided.decision.pairs] == [Mode.EXPERT, Mode.LEARNING]
    assert [p.pair.teacher for p in decided.decision.pairs] == ["a", "b"]
    assert decided.decision.paused == ("a",)
    assert decided.decision.pairs[0].distances.gap == 1.0


def test_adds_the_sums_of_a_teachers_ranks_in_the_order_of_ranks() -> None:
    plan = Plan(Topology((("a", T), ("s", S))), ((0, 1, 2), (3,)), "switokd", "d", 60.0)
    parts = [PairSums(v, v, v, 10**16) for v in (1e16, 1.0, 1.0)]
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        run = started(plan)
        for rank in order:
            decided = run.report(rank, 1, {Pair("a", "s"): parts[rank]}, now=0.0)
        assert decided is not None
        results.append(decided.decision)
    # 1e16 + 1 rounds to 1e16: another order would give another sum.
    assert (1e16 + 1.0) + 1.0 != 1e16 + (1.0 + 1.0)
    assert results[0].pairs[0].distances.gap == 1e16 / (3 * 10**16)
    assert results[1:] == results[:1] * 2
    assert results[0].pairs[0].distances.n == 3 * 10**16


def test_unequal_shards_are_weighted_by_their_samples() -> None:
    plan = Plan(Topology((("a", T), ("s", S))), ((0, 1), (2,)), "switokd", "d", 60.0)
    run = started(plan)
    run.report(0, 1, {Pair("a", "s"): PairSums(6.0, 3.0, 1.5, 3)}, now=0.0)
    decided = run.report(1, 1, {Pair("a", "s"): PairSums(0.0, 1.0, 0.5, 1)}, now=0.0)
    assert decided is not None
    d = decided.decision.pairs[0].distances
    assert (d.gap, d.e_s, d.e_t, d.n) == (1.5, 1.0, 0.5, 4)


def mixed_parts() -> dict[int, dict[Pair, PairSums]]:
    """Reports of one step of `MIXED`, by rank; every part has other numbers."""
    parts = [PairSums(v / 8, v / 4, v / 16, v) for v in (3, 5, 7, 11, 13, 17)]
    a, b = Pair("a", "s"), Pair("b", "s")
    return {
        0: {b: parts[0]},
        1: {a: parts[1]},
        2: {a: parts[2], b: parts[3]},
        3: {a: parts[4], b: parts[5]},
    }


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_ranks_may_hold_several_networks_and_networks_span_ranks(order: tuple[int, ...]) -> None:
    run = started(MIXED)
    parts = mixed_parts()
    *early, decided = [run.report(rank, 1, parts[rank], now=0.0) for rank in order]
    assert early == [None] * 3
    assert decided is not None
    a, b = (p.distances for p in decided.decision.pairs)
    assert (a.n, b.n) == (5 + 7 + 13, 3 + 11 + 17)
    assert a.gap == (5 / 8 + 7 / 8 + 13 / 8) / 25
    assert b.e_t == (3 / 16 + 11 / 16 + 17 / 16) / 31
    assert [p.pair for p in decided.decision.pairs] == list(MIXED.topology.pairs)


def test_one_rank_may_hold_everything() -> None:
    plan = replace(PLAN, ranks=((0,), (0,), (0,)))
    run = started(plan)
    decided = run.report(0, 1, {Pair("a", "s"): EXPERT, Pair("b", "s"): LEARNING}, now=0.0)
    assert decided is not None
    assert decided.decision.paused == ("a",)
    assert run.describe(0) == "rank 0 (a, b, s)"


def test_a_rank_must_report_all_pairs_it_holds_in_the_plans_order() -> None:
    run = started(MIXED)
    a, b = Pair("a", "s"), Pair("b", "s")
    for pairs in ({b: LEARNING, a: LEARNING}, {a: LEARNING}, {b: LEARNING}, {}):
        kind, reason = refusal(lambda pairs=pairs: run.report(2, 1, pairs, now=0.0))  # type: ignore[misc]
        assert kind == "INVALID_ARGUMENT"
        assert "rank 2 (a, b, s) must report the pairs a-s, b-s at step 1" in reason
    assert run.report(2, 1, {a: LEARNING, b: LEARNING}, now=0.0) is None


def test_some_but_not_all_ranks_of_a_pair_may_have_no_samples() -> None:
    a, b = Pair("a", "s"), Pair("b", "s")
    run = started(MIXED)
    run.report(0, 1, {b: EMPTY}, now=0.0)
    run.report(2, 1, {a: EMPTY, b: LEARNING}, now=0.0)
    run.report(3, 1, {a: EMPTY, b: EMPTY}, now=0.0)
    kind, reason = refusal(lambda: run.report(1, 1, {a: EMPTY}, now=0.0))
    assert kind == "INVALID_ARGUMENT"
    assert "rank 1 (a, s) is the last to report n=0 samples for a and s at step 1" in reason
    decided = run.report(1, 1, {a: EXPERT}, now=0.0)
    assert decided is not None
    assert [p.distances for p in decided.decision.pairs] == [EXPERT.mean(), LEARNING.mean()]


@pytest.mark.parametrize(
    ("rank", "step", "pairs", "kind", "words"),
    [
        (0, 2, {Pair("a", "s"): LEARNING}, "FAILED_PRECONDITION", "skips ahead"),
        (0, 0, {Pair("a", "s"): LEARNING}, "FAILED_PRECONDITION", "goes backwards"),
        (0, 1, {}, "INVALID_ARGUMENT", "a-s"),
        (0, 1, {Pair("b", "s"): LEARNING}, "INVALID_ARGUMENT", "a-s"),
        (2, 1, {Pair("a", "s"): LEARNING}, "INVALID_ARGUMENT", "none"),
        (3, 1, {}, "INVALID_ARGUMENT", "ranks 0 to 2, not 3"),
        (-1, 1, {}, "INVALID_ARGUMENT", "ranks 0 to 2, not -1"),
        (0, 1, {Pair("a", "s"): LEARNING._replace(gap=float("nan"))}, "INVALID_ARGUMENT", "finite"),
        (0, 1, {Pair("a", "s"): LEARNING._replace(e_t=float("inf"))}, "INVALID_ARGUMENT", "finite"),
        (0, 1, {Pair("a", "s"): LEARNING._replace(e_t=-0.1)}, "INVALID_ARGUMENT", "finite"),
        (0, 1, {Pair("a", "s"): LEARNING._replace(gap=16.1)}, "INVALID_ARGUMENT", "at most 2 per"),
        (0, 1, {Pair("a", "s"): LEARNING._replace(n=0)}, "INVALID_ARGUMENT", "n=0"),
        (0, 1, {Pair("a", "s"): EMPTY}, "INVALID_ARGUMENT", "some rank must have some"),
        (0, 1, {Pair("a", "s"): EMPTY._replace(n=-1)}, "INVALID_ARGUMENT", "n=-1"),
    ],
)
def test_a_refused_report_changes_nothing(
    rank: int, step: int, pairs: dict[Pair, PairSums], kind: str, words: str
) -> None:
    run = started()
    actual_kind, reason = refusal(lambda: run.report(rank, step, pairs, now=0.0))
    assert actual_kind == kind
    assert words in reason
    run.report(0, 1, {Pair("a", "s"): LEARNING}, now=0.0)
    assert run.report(1, 1, {Pair("b", "s"): LEARNING}, now=0.0) is not None


def test_a_step_that_is_reported_twice_counts_once() -> None:
    run = started()
    a, b = Pair("a", "s"), Pair("b", "s")
    run.report(0, 1, {a: EXPERT}, now=0.0)
    assert run.report(0, 1, {a: LEARNING}, now=0.0) is None
    first = run.report(1, 1, {b: LEARNING}, now=0.0)
    assert first is not None
    assert first.decision.mode(a) is Mode.EXPERT
    assert run.report(1, 1, {b: EXPERT}, now=0.0) is None
    assert run.last_decision == first.decision


def test_a_mode_that_a_teachers_first_rank_has_chosen_holds() -> None:
    run = started()
    a, b = Pair("a", "s"), Pair("b", "s")
    run.report(0, 1, {a: EXPERT}, 0.0, {a: Mode.LEARNING})
    decided = run.report(1, 1, {b: EXPERT}, now=0.0)
    assert decided is not None
    assert [p.mode for p in decided.decision.pairs] == [Mode.LEARNING, Mode.EXPERT]
    assert decided.decision.paused == ("b",)


@pytest.mark.parametrize("kind", ["not a number", "infinite", "no pairs", "other pairs", "late"])
def test_a_settled_step_that_no_run_can_have_is_refused(kind: str) -> None:
    run = started()
    pair = PairDecision(Pair("a", "s"), EXPERT.mean(), 0.5, 0.1, Mode.EXPERT)
    other = replace(pair, pair=Pair("b", "s"))
    right = Decision(1, (pair, other), ("a", "b"))
    wrong = {
        "not a number": replace(right, pairs=(replace(pair, delta=math.nan), other)),
        "infinite": replace(right, pairs=(pair, replace(other, epsilon=math.inf))),
        "no pairs": replace(right, pairs=()),
        "other pairs": replace(right, pairs=(other, pair)),
        "late": replace(right, step=2**62 + 1),
    }[kind]
    assert refusal(lambda: run.add_settled(wrong))[0] == "INVALID_ARGUMENT"
    assert run.settled == 0
    assert run.add_settled(right)
