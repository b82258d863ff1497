"""Round trip of a bare gRPC stream: the lower bound for a decision on this machine.

    python -m bench.echo      start the server, which prints its port

Server (asyncio) and client (threads) are of the same kinds as the coordinator and its clients.

Not covered: TLS, several streams.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from queue import SimpleQueue
from statistics import mean
from typing import Any

import grpc

from bench.machine import REPOSITORY

METHOD, MESSAGE = "/bench.Echo/Stream", bytes(150)
"""The message has about the size of a report with two pairs."""


def round_trip(trips: int, pause: float = 0.0) -> float:
    """Mean seconds of a round trip, with `pause` seconds between two trips."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.echo"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            with grpc.insecure_channel(f"127.0.0.1:{server.stdout.readline().strip()}") as channel:
                return _round_trip(channel, trips, pause)
        finally:
            server.terminate()


def _round_trip(channel: grpc.Channel, trips: int, pause: float) -> float:
    outgoing: SimpleQueue[bytes | None] = SimpleQueue()

    def requests() -> Iterator[bytes]:
        while (message := outgoing.get()) is not None:
            yield message

    call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
    replies = call(requests())
    seconds = []
    for _ in range(trips + trips // 10):
        time.sleep(pause)
        started = time.perf_counter()
        outgoing.put(MESSAGE)
        next(replies)
        seconds.append(time.perf_counter() - started)
    outgoing.put(None)
    return mean(seconds[-trips:])


async def _serve() -> None:
    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in requests:
            yield message

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
    handlers = {"Stream": grpc.stream_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
