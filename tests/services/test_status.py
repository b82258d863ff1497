"""The status of a large run is made in small parts, and lists are limited, without a server."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from switokd.services.coordinator.health import Heartbeat
from switokd.services.coordinator.limits import Limits
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.status import RANKS_AT_ONCE, ranks_to_wire
from switokd.services.coordinator.views import MOST_RUNS, Views
from switokd.v1 import coordinator_pb2 as pb
from tests.services.examples import PLAN, started

WORLD = 1024
LARGE = replace(PLAN, ranks=tuple(tuple(range(WORLD)) for _ in PLAN.ranks))


def test_ranks_are_described_a_few_at_a_time_with_their_lag() -> None:
    run = started(replace(LARGE, ranks=((0,), (0,), tuple(range(1, WORLD)))))
    for rank in range(WORLD):
        run.health.beat(rank, Heartbeat("forward", 1, 0.5, 0.5, waits=False), now=0.5)
    for rank in range(1, 9):
        run.report(rank, 1, {}, now=0.5)
    run.report(1, 2, {}, now=0.5)
    run.hang(now=1.0)
    parts = list(ranks_to_wire(run))
    assert max(map(len, parts)) == RANKS_AT_ONCE
    ranks = [rank for part in parts for rank in part]
    assert [rank.rank for rank in ranks] == list(range(WORLD))
    assert [rank.lag_steps for rank in ranks[:10]] == [2, 0, 1, 1, 1, 1, 1, 1, 1, 2]


def test_other_tasks_run_while_a_large_run_is_described() -> None:
    runs = RunRegistry(Metrics(), clock=lambda: 0.5)
    for rank in range(WORLD):
        run = runs.join("r", rank, LARGE, now=0.0)
        run.attach(rank)
        run.health.beat(rank, Heartbeat("forward", 1, 0.5, 0.5, waits=False), now=0.5)
    run.hang(now=0.5)
    turns = []

    async def others() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def describe() -> pb.GetRunStatusResponse:
        task = asyncio.create_task(others())
        status = await Views(runs).status("r")
        task.cancel()
        return status

    assert len(asyncio.run(describe()).ranks) == WORLD
    assert len(turns) >= WORLD // RANKS_AT_ONCE


def test_a_list_has_at_most_so_many_runs() -> None:
    runs = RunRegistry(Metrics(), limits=Limits(max_runs=MOST_RUNS + 1))
    for number in range(MOST_RUNS + 1):
        runs.join(f"run{number}", 0, PLAN, now=0.0)
    views = Views(runs)
    for asked, expected in ((0, MOST_RUNS), (10**6, MOST_RUNS), (7, 7), (-1, MOST_RUNS)):
        answer = asyncio.run(views.runs(False, asked))
        assert (len(answer.runs), answer.truncated) == (expected, True)


def test_a_run_that_is_nowhere_is_not_found() -> None:
    with pytest.raises(Refusal, match="no run 'nobody' here"):
        asyncio.run(Views(RunRegistry(Metrics())).status("nobody"))
