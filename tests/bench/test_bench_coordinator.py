"""The coordinator's benchmark runs and counts correctly.

Not covered: the values of the figures.
"""

from __future__ import annotations

import socket

import pytest

from bench.coordinator import Case, measure_case
from bench.load import Load, Rank

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
