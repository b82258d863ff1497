"""The line in which the calls of a burst wait, and a live burst that holds up nobody else."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from switokd.services.coordinator.line import LONGEST_SECONDS, QUIET_SECONDS, Line
from switokd.v1 import coordinator_pb2 as pb
from tests.services.live import Coordinator, HonestRun, coordinator, plan
from tests.support import wait_until


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def in_line(*calls: str) -> tuple[list[str], Line]:
    """Let calls come at once; return the connections in the order of their turns, and the line."""
    clock = Clock()
    order: list[str] = []

    async def call(line: Line, connection: str) -> None:
        await line.enter(connection)
        order.append(connection)

    async def burst() -> Line:
        line = Line(clock)
        tasks = [asyncio.create_task(call(line, connection)) for connection in calls]
        await asyncio.sleep(0.005)
        assert order == []
        while not all(task.done() for task in tasks):
            clock.now += QUIET_SECONDS
            await asyncio.sleep(0.003)
        return line

    return order, asyncio.run(asyncio.wait_for(burst(), 20))


def test_connections_take_turns_and_each_keeps_its_order() -> None:
    order, line = in_line(*"aaaab", "c", "c")
    assert order == list("abcacaa")
    assert len(line) == 0


def test_a_single_call_and_a_free_call_do_not_wait() -> None:
    async def calls() -> None:
        clock = Clock()
        line = Line(clock)
        clock.now += QUIET_SECONDS
        await line.enter("a")
        await line.enter("b", at_once=True)
        waits = asyncio.create_task(line.enter("c"))
        await asyncio.sleep(0)
        assert len(line) == 1
        await line.enter("d", at_once=True)
        assert not waits.done()
        clock.now += QUIET_SECONDS
        await waits

    asyncio.run(asyncio.wait_for(calls(), 20))


@pytest.mark.parametrize("gone", [(0,), (0, 1), (0, 1, 2)])
def test_callers_that_go_as_their_turn_comes_do_not_stop_the_line(gone: tuple[int, ...]) -> None:
    async def calls() -> list[str]:
        clock, order = Clock(), []
        line = Line(clock)

        async def call(name: str) -> None:
            await line.enter("a")
            order.append(name)

        tasks = [asyncio.create_task(call(name)) for name in "xyz"]
        await asyncio.sleep(0)
        clock.now += QUIET_SECONDS
        for number in gone:
            tasks[number].cancel()
        line._look()  # before the tasks have learned that they are cancelled
        last = asyncio.create_task(call("last"))
        while not last.done():
            clock.now += QUIET_SECONDS
            await asyncio.sleep(0.003)
        assert len(line) == 0
        return order

    order = asyncio.run(asyncio.wait_for(calls(), 20))
    assert order == [*("xyz"[i] for i in range(3) if i not in gone), "last"]


def test_calls_that_never_stop_coming_do_not_stop_the_line() -> None:
    async def calls() -> int:
        clock = Clock()
        line = Line(clock)
        waiting = [asyncio.create_task(line.enter("a")) for _ in range(3)]
        came = 0
        while not all(task.done() for task in waiting):
            clock.now += QUIET_SECONDS / 2
            await line.enter("b", at_once=True)
            came += 1
            await asyncio.sleep(0.0003)
        return came

    least = 3 * (LONGEST_SECONDS / QUIET_SECONDS) * 2
    assert asyncio.run(asyncio.wait_for(calls(), 20)) >= least - 3


def test_a_call_whose_caller_has_gone_leaves_the_line() -> None:
    async def calls() -> None:
        clock = Clock()
        line = Line(clock)
        first, second = (asyncio.create_task(line.enter("a")) for _ in range(2))
        await asyncio.sleep(0)
        assert len(line) == 2
        first.cancel()
        await asyncio.sleep(0)
        assert len(line) == 1
        clock.now += QUIET_SECONDS
        await second
        assert first.cancelled()

    asyncio.run(asyncio.wait_for(calls(), 20))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    folder: Path = tmp_path_factory.mktemp("burst")
    with coordinator(folder) as under_test:
        yield under_test


def channel(address: str, number: int) -> grpc.Channel:
    """A channel with a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("tests.number", number)]
    return grpc.insecure_channel(address, options=options)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_run_and_a_join_go_on_during_a_burst(served: Coordinator) -> None:
    """In which order they are answered, the tests above say: here the machine may be slow."""
    honest = HonestRun(served)
    request = pb.GetRunStatusRequest(run_id=honest.run_id).SerializeToString()
    channels = [channel(served.address, number) for number in range(11)]
    for each in channels:
        grpc.channel_ready_future(each).result(20)
    made: list[Any] = [
        each.unary_unary(f"/switokd.v1.CoordinatorService/{name}")
        for each, name in zip(channels, ["GetRunStatus"] * 10 + ["Join"], strict=True)
    ]
    *methods, join = made
    with stopped(served.pid):  # what is sent now comes all at once
        calls = [method.future(request, timeout=120) for _ in range(40) for method in methods]
        time.sleep(0.2)  # until the client has sent them
    wait_until(lambda: any(call.done() for call in calls), 60, "a first answer")
    join(pb.JoinRequest(run_id="other", plan=plan()).SerializeToString(), timeout=120)
    honest.end()
    for call in calls:
        call.cancel()
    for each in channels:
        each.close()
