"""The two processes beside a run: one makes a burst of calls, the other joins new runs.

    python -m bench.callers burst ADDRESS CONNECTIONS CALLS
    python -m bench.callers join ADDRESS

Each prints a line when it begins, and its result once its input ends. Without PyTorch, whose import
would take the core that the run's load needs.

Not covered: what is measured (`bursts.py`).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import grpc

from bench.load import TOPOLOGY, run_plan
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc

PAUSE_SECONDS = 0.1
"""Between two joins: each makes a run, of which a coordinator holds a thousand."""


def burst(address: str, connections: int, calls: int) -> list[int]:
    """Make all calls at once; return how many were answered until the input has ended."""
    request = pb.GetRunStatusRequest(run_id="run0").SerializeToString()
    channels = [_channel(address, number) for number in range(connections)]
    for channel in channels:
        grpc.channel_ready_future(channel).result(20)
    methods: list[Any] = [
        each.unary_unary("/switokd.v1.CoordinatorService/GetRunStatus") for each in channels
    ]
    print("begins", flush=True)
    futures = [
        method.future(request) for _ in range(calls // max(connections, 1)) for method in methods
    ]
    sys.stdin.read()
    answered = sum(future.done() and future.code() is grpc.StatusCode.OK for future in futures)
    for future in futures:
        future.cancel()
    return [answered]


def joins(address: str) -> list[float]:
    """Join new runs, each over a new connection; return the seconds of each, with connecting."""
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    plan = run_plan([[0]] * len(TOPOLOGY))
    print("begins", flush=True)
    seconds: list[float] = []
    while not ended.wait(PAUSE_SECONDS):
        request = pb.JoinRequest(run_id=f"new{len(seconds)}", rank=0, plan=plan)
        began = time.perf_counter()
        with _channel(address, len(seconds)) as channel:
            pb_grpc.CoordinatorServiceStub(channel).Join(request, timeout=60)
        seconds.append(time.perf_counter() - began)
    return seconds


def _channel(address: str, number: int) -> grpc.Channel:
    """Return a channel that shares its connection with no other."""
    return grpc.insecure_channel(
        address, options=[("grpc.use_local_subchannel_pool", 1), ("bench.number", number)]
    )


if __name__ == "__main__":
    what, at, *numbers = sys.argv[1:]
    print(json.dumps(joins(at) if what == "join" else burst(at, *map(int, numbers))))
