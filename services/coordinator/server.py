"""Starts the coordinator's two ports and runs until told to stop.

When both ports answer, one JSON line on standard output says where:
{"grpc": "127.0.0.1:50051", "http": "127.0.0.1:9464", "pid": 4711}

Not covered: TLS; serving more than one process.
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

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from switokd.errors import UsageError
from switokd.services.coordinator.http_server import serve_http
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.servicer import SERVICE, Coordinator

CHANNEL_OPTIONS = [
    # Two coordinators must not share a port and split a run between them.
    ("grpc.so_reuseport", 0),
    # A rank whose machine vanishes sends no goodbye: ask, and notice within about 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
GRACE_SECONDS = 5.0


async def serve(
    host: str, port: int, http_port: int, follow_stdin: bool, strategies: Collection[str] = ()
) -> None:
    """Serve until SIGTERM or SIGINT; with `follow_stdin` also until standard input ends.

    Port 0 takes a free one. strategies: import strings that runs may name. UsageError if a port is
    taken or the host is not this machine's.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    # What the imports made lives as long as the process: a full collection that looks through all
    # of it would hold every rank up for some 5 ms.
    gc.freeze()
    metrics = Metrics()
    coordinator = Coordinator(metrics, strategies=strategies)
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((coordinator.handlers(),))
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        port = server.add_insecure_port(f"{host}:{port}")
        http_port, http = serve_http(metrics.registry, host, http_port)
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"cannot listen on {host}, ports {port} and {http_port}: {error}; "
            "choose others with --port and --http-port (0 takes a free one)"
        ) from None
    await server.start()
    for name in ("", SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    ready = {"grpc": f"{host}:{port}", "http": f"{host}:{http_port}", "pid": os.getpid()}
    print(json.dumps(ready), flush=True)

    watch = asyncio.create_task(coordinator.watch())
    if follow_stdin:
        await _until_stdin_ends(stop)
        # Whoever started this is done, or dead. In the second case its run's other ranks are
        # about to be told why: let them be.
        deadline = loop.time() + GRACE_SECONDS
        while coordinator.streams and loop.time() < deadline:
            await asyncio.sleep(0.05)
    else:
        await stop.wait()
    logging.getLogger(__name__).info("stopping")
    watch.cancel()
    await health.enter_graceful_shutdown()
    await server.stop(grace=1.0)
    http.shutdown()


async def _until_stdin_ends(stop: asyncio.Event) -> None:
    """Return when standard input is closed (its writer's death closes it too) or `stop` is set."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    ended = asyncio.create_task(reader.read())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([ended, stopped], return_when=asyncio.FIRST_COMPLETED)
    for task in (ended, stopped):
        task.cancel()
