"""Hostile messages beside an honest run; `tests.services.fuzz` sends more of them.

Not covered: the attacks of one kind each, which the tests of each limit make.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.message import DecodeError

from switokd.v1 import coordinator_pb2 as pb
from tests.services.fuzz import fuzz
from tests.services.hostile import METHODS, Hostile

MESSAGES = 2000


@pytest.mark.timeout(90)
def test_an_honest_run_keeps_its_decisions_under_hostile_messages(tmp_path: Path) -> None:
    outcome = fuzz(MESSAGES, 7, tmp_path)
    assert outcome.problems == []
    assert outcome.messages >= MESSAGES
    assert outcome.steps > 20
    assert outcome.kinds.keys() == {*METHODS, "raw to gRPC", "raw to HTTP"}
    assert any(status.startswith("Join INVALID_ARGUMENT") for status in outcome.answers)
    assert outcome.memory_growth < 200e6


def test_a_seed_makes_the_same_messages() -> None:
    both = [Hostile(3, "honest") for _ in range(2)]
    made = [[h.serialized(name) for name in METHODS for _ in range(20)] for h in both]
    assert made[0] == made[1]
    assert both[0].raw() == both[1].raw()


def test_the_messages_are_of_both_kinds_valid_and_not() -> None:
    hostile = Hostile(1, "honest")
    valid = sum(is_valid(hostile.serialized("Train")) for _ in range(200))
    assert 40 < valid < 190


def is_valid(content: bytes) -> bool:
    try:
        pb.TrainRequest.FromString(content)
    except DecodeError:
        return False
    return True
