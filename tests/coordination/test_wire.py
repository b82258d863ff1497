"""Decisions and sums are bit for bit the same after the wire, so that all ranks act alike."""

from __future__ import annotations

import math
import random

import pytest

from switokd import wire
from switokd.distillation.decision import (
    Decision,
    Mode,
    PairDecision,
    Rule,
    decide,
)
from switokd.distillation.gap import Distances, PairSums
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role
from switokd.v1 import coordinator_pb2 as pb

PAIRS = [Pair("t2", "s1"), Pair("t1", "s1"), Pair("Ü-1", "s_2")]  # not in alphabetical order
EXTREMES = [0.0, 5e-324, 1e-300, math.nextafter(1, 2), 0.1 + 0.2, 2.0, 1.7976931348623157e308]


def doubles(seed: int) -> list[float]:
    """Nine doubles of many magnitudes."""
    generator = random.Random(seed)
    return [generator.random() * 10 ** generator.randint(-20, 5) for _ in range(9)]


@pytest.mark.parametrize("numbers", [*map(doubles, range(10)), [*EXTREMES, 1.0, 3.0]])
def test_sums_are_the_same_after_the_wire(numbers: list[float]) -> None:
    triples = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    sums = {p: PairSums(*triple, 2**31 - 1) for p, triple in zip(PAIRS, triples, strict=True)}
    message = pb.Report(pairs=wire.sums_to_wire(sums))
    received = wire.sums_from_wire(pb.Report.FromString(message.SerializeToString()))
    assert received == sums
    assert list(received) == PAIRS


@pytest.mark.parametrize("seed", range(20))
def test_a_decision_is_the_same_after_the_wire(seed: int) -> None:
    generator = random.Random(seed)
    numbers = [[2 * generator.random() for _ in range(3)] for _ in PAIRS]
    distances = {p: Distances(a, b, c, 128) for p, (a, b, c) in zip(PAIRS, numbers, strict=True)}
    decision = decide(2**40 + seed, distances, Rule(make_strategy("switokd").switch))
    message = wire.decision_to_wire(decision)
    assert wire.decision_from_wire(pb.Decision.FromString(message.SerializeToString())) == decision


def test_every_field_has_its_own_value() -> None:
    pair = PairDecision(Pair("t", "s"), Distances(1, 2, 3, 4), 5, 6, Mode.EXPERT)
    decision = Decision(7, (pair,), ("t", "u"))
    message = wire.decision_to_wire(decision)
    (sent,) = message.pairs
    assert (sent.teacher, sent.student, sent.n) == ("t", "s", 4)
    assert (sent.gap, sent.e_s, sent.e_t, sent.epsilon, sent.delta) == (1, 2, 3, 5, 6)
    assert sent.mode == pb.MODE_EXPERT
    assert (message.step, list(message.paused)) == (7, ["t", "u"])
    assert wire.decision_from_wire(message) == decision
    (sums,) = wire.sums_to_wire({Pair("t", "s"): PairSums(1, 2, 3, 4)})
    assert (sums.teacher, sums.student, sums.gap, sums.e_s, sums.e_t) == ("t", "s", 1, 2, 3)


def test_every_role_and_mode_has_its_own_wire_value_and_none_is_0() -> None:
    assert wire.ROLE_TO_WIRE == {Role.TEACHER: pb.ROLE_TEACHER, Role.STUDENT: pb.ROLE_STUDENT}
    assert wire.MODE_TO_WIRE == {Mode.LEARNING: pb.MODE_LEARNING, Mode.EXPERT: pb.MODE_EXPERT}
    assert 0 not in [
        *wire.ROLE_FROM_WIRE,
        *wire.MODE_FROM_WIRE,
    ]  # a field that is not set reads as 0
    assert [wire.MODE_FROM_WIRE[wire.MODE_TO_WIRE[mode]] for mode in Mode] == list(Mode)
    assert [wire.ROLE_FROM_WIRE[wire.ROLE_TO_WIRE[role]] for role in Role] == list(Role)
