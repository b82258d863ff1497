"""The coordinator's core, without a server: joining, rounds, refusals, what ends a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest

from switokd.distillation.decision import Mode
from switokd.distillation.gap import PairSums
from switokd.distillation.topology import Pair, Role, Topology
from switokd.services.coordinator.plan import Plan, Refusal
from switokd.services.coordinator.rounds import Phase, RunState

T, S = Role.TEACHER, Role.STUDENT
PLAN = Plan(Topology((("a", T), ("b", T), ("s", S))), ((0,), (1,), (2,)), "switokd", "d", 60.0)
FAR = PairSums(gap=8.0, e_s=8.0, e_t=1.0, n=8)  # far ahead: expert mode
NEAR = PairSums(gap=0.8, e_s=8.0, e_t=7.0, n=8)
EMPTY = PairSums(gap=0.0, e_s=0.0, e_t=0.0, n=0)  # a rank without samples, at a short last batch
# "b" has a rank of its own, "a" and "s" share one, and all three share the others.
MIXED = Plan(
    Topology((("a", T), ("b", T), ("s", S))),
    ((1, 2, 3), (0, 2, 3), (1, 2, 3)),
    *("switokd", "d", 60.0),
)


def started(plan: Plan = PLAN) -> RunState:
    run = RunState("r", plan, now=0.0)
    for rank in plan.networks_of:
        run.join(rank, plan)
        run.attach(rank)
    return run


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value.kind.name, str(caught.value)


def test_decides_when_the_last_teacher_has_reported_whatever_the_order() -> None:
    run = started()
    assert run.report(1, 1, {Pair("b", "s"): NEAR}, now=5.0) is None
    assert run.report(2, 1, {}, now=5.5) is None
    decided = run.report(0, 1, {Pair("a", "s"): FAR}, now=7.0)
    assert decided is not None
    assert decided.duration == 2.0
    assert [p.mode for p in decided.decision.pairs] == [Mode.EXPERT, Mode.LEARNING]
    assert [p.pair.teacher for p in decided.decision.pairs] == ["a", "b"]
    assert decided.decision.paused == ("a",)
    assert decided.decision.pairs[0].distances.gap == 1.0


def test_a_teachers_ranks_are_added_up_in_rank_order() -> None:
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
    """A step's reports of `MIXED`, every part with numbers of its own."""
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
    decided = run.report(0, 1, {Pair("a", "s"): FAR, Pair("b", "s"): NEAR}, now=0.0)
    assert decided is not None
    assert decided.decision.paused == ("a",)
    assert run.who(0) == "rank 0 (a, b, s)"


def test_a_rank_must_report_all_pairs_it_holds_in_the_plans_order() -> None:
    run = started(MIXED)
    a, b = Pair("a", "s"), Pair("b", "s")
    for pairs in ({b: NEAR, a: NEAR}, {a: NEAR}, {b: NEAR}, {}):
        kind, sentence = refusal(lambda pairs=pairs: run.report(2, 1, pairs, now=0.0))  # type: ignore[misc]
        assert kind == "INVALID_ARGUMENT"
        assert "rank 2 (a, b, s) must report the pairs a-s, b-s at step 1" in sentence
    assert run.report(2, 1, {a: NEAR, b: NEAR}, now=0.0) is None


def test_a_rank_without_samples_changes_nothing_unless_all_are_without() -> None:
    a, b = Pair("a", "s"), Pair("b", "s")
    run = started(MIXED)
    run.report(0, 1, {b: EMPTY}, now=0.0)
    run.report(2, 1, {a: EMPTY, b: NEAR}, now=0.0)
    run.report(3, 1, {a: EMPTY, b: EMPTY}, now=0.0)
    kind, sentence = refusal(lambda: run.report(1, 1, {a: EMPTY}, now=0.0))
    assert kind == "INVALID_ARGUMENT"
    assert "rank 1 (a, s) is the last to report n=0 samples for a and s at step 1" in sentence
    decided = run.report(1, 1, {a: FAR}, now=0.0)
    assert decided is not None
    assert [p.distances for p in decided.decision.pairs] == [FAR.mean(), NEAR.mean()]


@pytest.mark.parametrize(
    ("rank", "step", "pairs", "kind", "words"),
    [
        (0, 2, {Pair("a", "s"): NEAR}, "FAILED_PRECONDITION", "skips ahead"),
        (0, 0, {Pair("a", "s"): NEAR}, "FAILED_PRECONDITION", "goes backwards"),
        (0, 1, {}, "INVALID_ARGUMENT", "a-s"),
        (0, 1, {Pair("b", "s"): NEAR}, "INVALID_ARGUMENT", "a-s"),
        (2, 1, {Pair("a", "s"): NEAR}, "INVALID_ARGUMENT", "none"),
        (3, 1, {}, "INVALID_ARGUMENT", "ranks 0 to 2, not 3"),
        (-1, 1, {}, "INVALID_ARGUMENT", "ranks 0 to 2, not -1"),
        (0, 1, {Pair("a", "s"): replace(NEAR, gap=float("nan"))}, "INVALID_ARGUMENT", "finite"),
        (0, 1, {Pair("a", "s"): replace(NEAR, e_t=float("inf"))}, "INVALID_ARGUMENT", "finite"),
        (0, 1, {Pair("a", "s"): replace(NEAR, e_t=-0.1)}, "INVALID_ARGUMENT", "finite"),
        (0, 1, {Pair("a", "s"): replace(NEAR, gap=16.1)}, "INVALID_ARGUMENT", "at most 2 per"),
        (0, 1, {Pair("a", "s"): replace(NEAR, n=0)}, "INVALID_ARGUMENT", "n=0"),
        (0, 1, {Pair("a", "s"): EMPTY}, "INVALID_ARGUMENT", "some rank must have some"),
        (0, 1, {Pair("a", "s"): replace(EMPTY, n=-1)}, "INVALID_ARGUMENT", "n=-1"),
    ],
)
def test_refuses_a_bad_report_and_goes_on_as_if_it_had_not_come(
    rank: int, step: int, pairs: dict[Pair, PairSums], kind: str, words: str
) -> None:
    run = started()
    found, sentence = refusal(lambda: run.report(rank, step, pairs, now=0.0))
    assert found == kind
    assert words in sentence
    run.report(0, 1, {Pair("a", "s"): NEAR}, now=0.0)
    assert run.report(1, 1, {Pair("b", "s"): NEAR}, now=0.0) is not None


def test_refuses_the_same_step_twice() -> None:
    run = started()
    run.report(2, 1, {}, now=0.0)
    kind, sentence = refusal(lambda: run.report(2, 1, {}, now=0.0))
    assert kind == "FAILED_PRECONDITION"
    assert "rank 2 (s) goes backwards: it reports step 1, step 2 is next" in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topology": Topology((("a", T), ("a", S), ("s", S)))}, "same name"),
        ({"topology": Topology((("a", T), ("b", T), ("s", T)))}, "at least one teacher"),
        ({"ranks": ((0,), (2,), (3,))}, "none left out; got [0, 2, 3]"),
        ({"ranks": ((-1, 0), (0,), (0,))}, "none left out; got [-1, 0]"),
        ({"ranks": ((0, 1, 1), (1,), (2,))}, "ascend, each once"),
        ({"ranks": ((1, 0), (1,), (2,))}, "ascend, each once"),
        ({"ranks": ((0, 1), (), (2,))}, "a network has no rank"),
        ({"strategy": "nonsense"}, "is not one of switokd, vanilla, dml"),
        ({"strategy": "os:system"}, "start it with --strategy os:system"),
        ({"strategy_kwargs": "{"}, "Expecting"),
        ({"strategy_kwargs": '{"delta": 1}'}, "cannot be made with strategy_kwargs"),
        ({"semantics": "rumoured"}, "one of paper, published"),
        ({"semantics": "published", "strategy": "kd"}, "strategies switokd and threshold alone"),
        ({"round_timeout": 0.0}, "above 0"),
        ({"round_timeout": float("nan")}, "above 0"),
    ],
)
def test_refuses_a_plan_no_run_can_follow(change: dict[str, object], words: str) -> None:
    kind, sentence = refusal(lambda: RunState("r", replace(PLAN, **change), now=0.0))  # type: ignore[arg-type]
    assert kind == "INVALID_ARGUMENT"
    assert words in sentence


def test_refuses_another_configuration_naming_the_rank() -> None:
    run = RunState("r", PLAN, now=0.0)
    run.join(0, PLAN)
    kind, sentence = refusal(lambda: run.join(1, replace(PLAN, config_digest="other")))
    assert kind == "FAILED_PRECONDITION"
    assert "rank 1 (b)" in sentence
    assert run.joined == {0}


def test_joining_twice_changes_nothing_and_a_second_stream_is_refused() -> None:
    run = RunState("r", PLAN, now=0.0)
    run.join(0, PLAN)
    run.join(0, PLAN)
    assert refusal(lambda: run.attach(1))[0] == "FAILED_PRECONDITION"
    run.attach(0)
    assert refusal(lambda: run.attach(0))[0] == "ALREADY_EXISTS"


def test_states_from_joining_to_finished() -> None:
    run = RunState("r", PLAN, now=0.0)
    assert run.state is Phase.JOINING
    run = started()
    assert run.state is Phase.TRAINING
    for rank in (0, 1, 2):
        assert run.ended_at is None
        run.leave(rank, "", now=9.0)
    assert (run.state, run.ended_at) == (Phase.FINISHED, 9.0)


def test_a_lost_rank_fails_the_run_and_the_first_reason_stays() -> None:
    run = started()
    run.report(1, 1, {Pair("b", "s"): NEAR}, now=0.0)
    run.lose(1, now=3.0)
    run.leave(0, "something else", now=4.0)
    assert run.state is Phase.FAILED
    assert run.failure == "rank 1 (b) went away after reporting step 1"
    assert run.ended_at == 3.0
    assert refusal(lambda: run.report(2, 1, {}, now=5.0))[0] == "FAILED_PRECONDITION"


def test_names_the_ranks_that_keep_a_round_open() -> None:
    run = started()
    run.report(0, 1, {Pair("a", "s"): NEAR}, now=10.0)
    assert run.watchdog(now=70.0) is None
    sentence = run.watchdog(now=70.1)
    assert sentence is not None
    assert "step 1" in sentence
    assert "rank 1 (b), rank 2 (s)" in sentence
    run.report(1, 1, {Pair("b", "s"): NEAR}, now=71.0)
    assert "from rank 2 (s) within" in (run.watchdog(now=71.0) or "")
    run.report(2, 1, {}, now=72.0)
    assert run.watchdog(now=1e9) is None  # between rounds nobody is waited for


def test_names_the_ranks_that_never_attach() -> None:
    run = RunState("r", PLAN, now=0.0)
    run.join(0, PLAN)
    run.attach(0)
    assert run.watchdog(now=60.0) is None
    assert "no stream from rank 1 (b), rank 2 (s)" in (run.watchdog(now=60.1) or "")


def test_names_the_rank_that_the_others_wait_for_in_a_collective() -> None:
    run = started()
    run.stall(0, "exchanging the logits of step 7", now=60.0)
    run.stall(2, "exchanging the logits of step 7", now=60.3)
    assert run.watchdog(now=60.9) is None
    sentence = run.watchdog(now=61.1) or ""
    assert sentence.startswith("rank 1 (b) did not answer")
    assert "exchanging the logits of step 7" in sentence


def test_says_so_when_a_collective_fails_on_every_rank() -> None:
    run = started()
    for rank in (0, 1, 2):
        run.stall(rank, "waiting", now=0.0)
    assert run.watchdog(now=2.0) == "every rank failed waiting"
