"""The coordinator's benchmark runs and counts correctly.

Not covered: the values of the figures.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from bench.coordinator import Case, measure_case
from bench.load import SETTLE_STEPS, Load, Rank
from bench.scale import measure_flooded, next_report, same_report
from switokd.v1 import coordinator_pb2 as pb

CASES = {
    "1, 1": Case(1, 1),
    "6, 2": Case(6, 2),
    "6, 1, apart=True": Case(6, 1, apart=True),
    "6, 1, paced=True": Case(6, 1, paced=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_kind_of_case_is_measured(case: Case) -> None:
    result = measure_case(case, 0.2)
    assert 10 < result.reports_per_second < 1e6
    assert 0 < result.p50_ms <= result.p99_ms < 10_000
    assert result.cpu_us_per_report > 0
    assert result.resident_mib > 10


def test_a_report_settles_no_step_that_is_still_to_be_decided() -> None:
    """The coordinator would ignore the report, and the load would wait forever."""
    load = Load("", [], [])
    for step in (1, SETTLE_STEPS - 1, SETTLE_STEPS, SETTLE_STEPS + 1, 2 * SETTLE_STEPS):
        report = pb.TrainRequest.FromString(load._bytes(step, ())[14:]).report
        assert report.step == step
        assert step - SETTLE_STEPS <= report.settled_step < step


@pytest.mark.parametrize(("goal", "sent"), [(None, 5), ({"run": 4}, 4)])
def test_a_rank_that_only_listens_catches_up(goal: dict[str, int] | None, sent: int) -> None:
    """On a busy machine, decisions of several steps may arrive at once."""
    of_rank, of_coordinator = socket.socketpair()
    with of_rank, of_coordinator:
        rank = Rank("run", 2, (), done=4, sent=1)
        rank.socket = of_rank
        load = Load("", [], [])
        load._report_next(rank, goal)
        assert rank.sent == sent
        expected = b"".join(load._bytes(step, ()) for step in range(2, sent + 1))
        of_coordinator.settimeout(10)
        assert of_coordinator.recv(1 << 16) == expected


@pytest.mark.parametrize("message", [next_report, same_report])
def test_the_others_go_on_beside_a_flood(message: Callable[[int], bytes]) -> None:
    assert measure_flooded(Case(6, 2), 0.5, message) > 10
