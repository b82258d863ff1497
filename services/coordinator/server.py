"""Starts the coordinator's two ports and serves until a signal.

When both ports are open, one JSON line on standard output gives their addresses:
{"grpc": "127.0.0.1:50051", "http": "127.0.0.1:9464", "pid": 4711}

Not covered: TLS, authentication, several processes on one port.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Collection
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from switokd.errors import UsageError
from switokd.services.coordinator.http_server import serve_http
from switokd.services.coordinator.journal import NO_JOURNAL, Journal
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.servicer import SERVICE, CoordinatorServicer

CHANNEL_OPTIONS = [
    # Without this, two coordinators could share a port and split a run between them.
    ("grpc.so_reuseport", 0),
    # A rank whose machine vanishes closes no connection. Pings detect this within about 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
GRACE_SECONDS = 3.0
"""How long streams may stay open after standard input has closed."""


async def serve(
    host: str,
    port: int,
    http_port: int,
    follow_stdin: bool,
    strategies: Collection[str] = (),
    journal: Journal = NO_JOURNAL,
) -> None:
    """Serve until SIGTERM or SIGINT; with `follow_stdin` also until standard input closes.

    port, http_port: 0 chooses a free port. strategies: import strings that a run may name.
    journal: where decisions are written down; it is closed at the end.
    UsageError if a port is in use, or if `host` is not an address of this machine.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    # Imported objects live as long as the process. A full garbage collection would scan all of
    # them and delay every rank by some 5 ms.
    gc.freeze()
    metrics = Metrics()
    runs = RunRegistry(metrics, strategies, journal=journal)
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    health = _add_services(server, runs)
    port, http_port, http_server = _open_ports(server, metrics, host, port, http_port)
    await server.start()
    for name in ("", SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    ready = {"grpc": f"{host}:{port}", "http": f"{host}:{http_port}", "pid": os.getpid()}
    print(json.dumps(ready), flush=True)

    watch = asyncio.create_task(runs.watch())
    if follow_stdin:
        await _until_stdin_closes(stop)
        await _until_streams_end(runs)
    else:
        await stop.wait()
    logging.getLogger(__name__).info("stopping")
    watch.cancel()
    await health.enter_graceful_shutdown()
    stopping = asyncio.create_task(server.stop(grace=1.0))  # accepts no new stream from here on
    await asyncio.sleep(0)
    runs.drain()
    await stopping
    http_server.shutdown()
    journal.close()


def _add_services(server: grpc.aio.Server, runs: RunRegistry) -> HealthServicer:
    """Add the coordinator, health checks and reflection to a server; return the health checks."""
    server.add_generic_rpc_handlers((CoordinatorServicer(runs).handlers(),))
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return health


def _open_ports(
    server: grpc.aio.Server, metrics: Metrics, host: str, port: int, http_port: int
) -> tuple[int, int, WSGIServer]:
    """Open both ports; return them with the HTTP server. UsageError if a port cannot be opened."""
    try:
        port = server.add_insecure_port(f"{host}:{port}")
        http_port, http_server = serve_http(metrics.registry, host, http_port)
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"cannot listen on {host}, ports {port} and {http_port}: {error}; "
            "choose others with --port and --http-port (0 chooses a free one)"
        ) from None
    return port, http_port, http_server


async def _until_stdin_closes(stop: asyncio.Event) -> None:
    """Wait for `stop` or for the end of standard input, which its writer's death closes as well."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    closed = asyncio.create_task(reader.read())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([closed, stopped], return_when=asyncio.FIRST_COMPLETED)
    for task in (closed, stopped):
        task.cancel()


async def _until_streams_end(runs: RunRegistry) -> None:
    """Wait for all streams to end, `GRACE_SECONDS` at most.

    If the parent process has died, its run fails, and the other ranks must still be told why.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GRACE_SECONDS
    while runs.open_streams and loop.time() < deadline:
        await asyncio.sleep(0.05)
