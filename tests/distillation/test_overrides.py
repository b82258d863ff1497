"""What commands change in the decisions, by step; and the decision under them."""

from __future__ import annotations

import pytest

from switokd.distillation.decision import (
    NOTHING,
    InForce,
    Mode,
    Rule,
    decide,
    unsafe_pairs,
)
from switokd.distillation.gap import Distances, delta
from switokd.distillation.overrides import Action, Command, Overrides, Stamped
from switokd.distillation.semantics import rule_of
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role, Topology

A, B = Pair("a", "s"), Pair("b", "s")
FAR = Distances(gap=1.8, e_s=1.2, e_t=0.2, n=8)  # pauses the teacher
NEAR = Distances(gap=0.1, e_s=1.2, e_t=1.1, n=8)
RULE = Rule(make_strategy("switokd").switch)
EXPERT, LEARNING = Mode.EXPERT, Mode.LEARNING


def stamped(step: int, action: str, teacher: str = "", **more: object) -> Stamped:
    return Stamped(Command(f"{action}-{step}", Action(action), teacher, **more), step)  # type: ignore[arg-type]


def in_force(step: int, *commands: Stamped) -> InForce:
    return Overrides([A, B], commands).at(step)


def test_without_commands_nothing_is_in_force() -> None:
    assert in_force(1) is NOTHING
    assert not NOTHING


@pytest.mark.parametrize(
    ("step", "mode"), [(4, None), (5, EXPERT), (9, EXPERT), (10, None), (99, None)]
)
def test_a_hold_lasts_from_its_first_step_until_its_last(step: int, mode: Mode | None) -> None:
    found = in_force(step, stamped(5, "hold", "a", mode=EXPERT, until_step=9))
    assert found.holds == ({A: mode} if mode else {})


def test_a_release_ends_a_hold_of_its_teacher_only() -> None:
    holds = [stamped(2, "hold", name, mode=EXPERT) for name in "ab"]
    assert in_force(6, *holds, stamped(7, "release", "a")).holds == {A: EXPERT, B: EXPERT}
    assert in_force(7, *holds, stamped(7, "release", "a")).holds == {B: EXPERT}


def test_a_later_hold_replaces_an_earlier_one_for_good() -> None:
    holds = (
        stamped(2, "hold", "a", mode=EXPERT),
        stamped(4, "hold", "a", mode=LEARNING, until_step=5),
    )
    found = [in_force(step, *holds).holds.get(A) for step in range(1, 8)]
    assert found == [None, EXPERT, EXPERT, LEARNING, LEARNING, None, None]


def test_the_last_scale_of_a_teacher_counts_and_1_ends_it() -> None:
    scales = [
        stamped(2, "scale", factor=2.0),
        stamped(4, "scale", "a", factor=0.5),
        stamped(6, "scale", factor=1.0),
    ]
    found = [dict(in_force(step, *scales).scales) for step in range(1, 7)]
    assert found == [{}, *2 * [{A: 2.0, B: 2.0}], *2 * [{A: 0.5, B: 2.0}], {}]


def test_of_a_continued_run_the_command_that_was_given_later_counts() -> None:
    """A hold at step 100, a kill, a checkpoint of step 90, and a release at step 96."""
    commands = stamped(100, "hold", "a", mode=EXPERT), stamped(96, "release", "a")
    assert not in_force(100, *commands).holds


def test_every_step_finds_the_same_whatever_was_asked_before() -> None:
    commands = [
        stamped(3, "hold", "a", mode=EXPERT, until_step=6),
        stamped(5, "scale", "b", factor=3.0),
        stamped(8, "hold", "b", mode=LEARNING),
    ]
    overrides = Overrides([A, B])
    steps = [9, 1, 5, 6, 7, 3, 2, 8, 4]
    assert [overrides.at(step) for step in steps] == [NOTHING] * len(steps)
    overrides.add(*commands)
    assert [overrides.at(step) for step in steps] == [in_force(step, *commands) for step in steps]


def test_refused_commands_checkpoints_and_stops_change_nothing() -> None:
    refused = Stamped(Command("x", Action.HOLD, "a", EXPERT), 1, failure="no")
    assert in_force(5, refused, stamped(1, "stop"), stamped(2, "checkpoint")) is NOTHING


def test_a_held_teacher_pauses_and_says_why() -> None:
    free = decide(3, {A: NEAR, B: FAR}, RULE)
    assert free.paused == ("b",)
    held = decide(3, {A: NEAR, B: FAR}, RULE, in_force=InForce({A: EXPERT, B: LEARNING}))
    assert held.paused == ("a",)
    assert [(p.mode, p.held, p.delta_scale) for p in held.pairs] == [
        (EXPERT, True, 1.0),
        (LEARNING, True, 1.0),
    ]
    assert [p.delta for p in held.pairs] == [p.delta for p in free.pairs]


def test_a_hold_comes_before_a_mode_that_a_rank_has_chosen() -> None:
    decided = decide(1, {A: FAR}, RULE, {A: EXPERT}, InForce({A: LEARNING}))
    assert decided.mode(A) is LEARNING


@pytest.mark.parametrize("strategy", ["switokd", "threshold"])
def test_a_scaled_threshold_shifts_the_comparison(strategy: str) -> None:
    made = make_strategy(strategy, {"delta": 0.8} if strategy == "threshold" else {})
    rule = rule_of(made, "paper", Topology((("a", Role.TEACHER), ("s", Role.STUDENT))))
    threshold = rule.delta(FAR, 0.0) if strategy == "threshold" else delta(FAR)
    at_once = Distances(threshold * 1.5, FAR.e_s, FAR.e_t, FAR.n)
    assert decide(1, {A: at_once}, rule).mode(A) is EXPERT
    scaled = decide(1, {A: at_once}, rule, in_force=InForce(scales={A: 2.0}))
    assert scaled.mode(A) is LEARNING
    assert (scaled.pairs[0].delta, scaled.pairs[0].delta_scale) == (threshold * 2.0, 2.0)


def test_where_rounding_matters_follows_the_scale_and_no_hold() -> None:
    edge = Distances(2 * delta(FAR), FAR.e_s, FAR.e_t, FAR.n)
    distances = {A: edge}
    scaled = InForce(scales={A: 2.0})
    assert unsafe_pairs(decide(1, distances, RULE), distances, RULE) == ()
    assert unsafe_pairs(decide(1, distances, RULE, in_force=scaled), distances, RULE) == (A,)
    held = InForce({A: EXPERT}, {A: 2.0})
    assert unsafe_pairs(decide(1, distances, RULE, in_force=held), distances, RULE) == ()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (Command("1", Action.HOLD, "x", EXPERT), "'x' is no teacher of this run: it has a, b"),
        (Command("1", Action.HOLD, "", EXPERT), "'' is no teacher"),
        (Command("1", Action.RELEASE, "s"), "'s' is no teacher"),
        (Command("1", Action.HOLD, "a"), "needs a mode"),
        (Command("1", Action.HOLD, "a", EXPERT, 7), "step 7, the last one of the hold, is over"),
        (Command("1", Action.HOLD, "a", EXPERT, -1), "above 0, got -1"),
        (Command("1", Action.SCALE, "x"), "'x' is no teacher"),
        *((Command("1", Action.SCALE, factor=f), "1e-06 to 1e+06") for f in (0.0, -1.0)),
        (Command("1", Action.SCALE, factor=float("inf")), "1e-06 to 1e+06"),
        (Command("1", Action.SCALE, factor=float("nan")), "1e-06 to 1e+06"),
    ],
)
def test_what_no_run_can_obey(command: Command, words: str) -> None:
    assert words in command.problem(["a", "b"], last_step=7)


@pytest.mark.parametrize(
    "command",
    [
        Command("1", Action.HOLD, "a", EXPERT, 8),
        Command("1", Action.SCALE, factor=0.5),
        Command("1", Action.RELEASE, "b"),
        Command("1", Action.STOP),
    ],
)
def test_what_a_run_can_obey(command: Command) -> None:
    assert command.problem(["a", "b"], last_step=7) == ""
