"""Starts the coordinator's two ports and serves until a signal.

When both ports are open, one JSON line on standard output gives their addresses:
{"grpc": "127.0.0.1:50051", "http": "127.0.0.1:9464", "pid": 4711,
 "status_page": "http://127.0.0.1:9464/"}

Not covered: several processes on one port.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Collection
from contextlib import suppress

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from switokd.errors import UsageError
from switokd.services.coordinator.access import FREE, Access
from switokd.services.coordinator.http_server import HttpAccess, HttpServer, serve_http
from switokd.services.coordinator.journal import NO_JOURNAL, Journal
from switokd.services.coordinator.limits import DEFAULTS, Limits
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.pace import PaceInterceptor
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.resources import channel_options, with_files
from switokd.services.coordinator.round_spans import NO_SPANS, RoundSpans
from switokd.services.coordinator.servicer import SERVICE, CoordinatorServicer
from switokd.services.coordinator.status_page.pages import StatusPages, make_pages

CHANNEL_OPTIONS = [
    # Without this, two coordinators could share a port and split a run between them.
    ("grpc.so_reuseport", 0),
    # A rank whose machine vanishes closes no connection. Pings detect this within about 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The streams of a large job open at once; gRPC would cancel some from the 1,000th on.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
]
SWITCH_SECONDS = 5e-4
"""A thread that reads a plan or makes /metrics keeps the event loop waiting for no longer."""
GRACE_SECONDS = 3.0
"""How long streams may stay open after standard input has closed."""


async def serve(
    host: str,
    port: int,
    http_port: int,
    follow_stdin: bool,
    strategies: Collection[str] = (),
    journal: Journal = NO_JOURNAL,
    access: Access = FREE,
    limits: Limits = DEFAULTS,
    round_spans: RoundSpans = NO_SPANS,
) -> None:
    """Serve until SIGTERM or SIGINT; with `follow_stdin` also until standard input closes.

    port, http_port: 0 chooses a free port. strategies: import strings that a run may name.
    journal: where decisions are written down; it is closed at the end. access: what callers must
    show. limits: see `Limits`. round_spans: receives each round. UsageError if a port is in use,
    or if `host` is not an address of this machine.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    # Imported objects live as long as the process. A full garbage collection would scan all of
    # them and delay every rank by some 5 ms.
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)
    limits = with_files(limits)
    metrics = Metrics(limits)
    runs = RunRegistry(metrics, strategies, limits.forget_after, journal, limits=limits)
    runs.round_spans = round_spans
    server = grpc.aio.server(
        options=[*CHANNEL_OPTIONS, *channel_options(limits)],
        interceptors=[PaceInterceptor(limits, SERVICE, metrics.service.refuse), access.security],
    )
    servicer = CoordinatorServicer(runs, access.security, stop.set)
    health = _add_services(server, servicer, access.reflection)
    pages = make_pages(runs, access.is_open_at(host))
    made = (metrics, access, limits, host, (port, http_port), pages)
    port, http_port, http_server = _open_ports(server, *made)
    await server.start()
    for name in ("", SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    print(_ready(access, host, port, http_port), flush=True)

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
    await pages.close()
    http_server.shutdown()
    journal.close()


def _ready(access: Access, host: str, port: int, http_port: int) -> str:
    """Return the line that says where the coordinator is. host: address of the gRPC port."""
    http = f"{access.http_at(host)[0]}:{http_port}"
    ready = {"grpc": f"{host}:{port}", "http": http, "pid": os.getpid()}
    return json.dumps({**ready, "status_page": access.page_at(host, http_port)})


def _add_services(
    server: grpc.aio.Server, servicer: CoordinatorServicer, with_reflection: bool
) -> HealthServicer:
    """Add the coordinator and health checks to a server; return the health checks."""
    server.add_generic_rpc_handlers((servicer.handlers(),))
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if with_reflection:
        from grpc_reflection.v1alpha import reflection

        names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    return health


def _open_ports(
    server: grpc.aio.Server,
    metrics: Metrics,
    access: Access,
    limits: Limits,
    host: str,
    ports: tuple[int, int],
    pages: StatusPages,
) -> tuple[int, int, HttpServer]:
    """Open both ports; return them with the HTTP server. UsageError if a port cannot be opened.

    ports: of gRPC and of HTTP.
    """
    port, http_port = ports
    http_host, certificates = access.http_at(host)
    try:
        if access.certificates:
            credentials = access.certificates.grpc_credentials()
            port = server.add_secure_port(f"{host}:{port}", credentials)
        else:
            port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:  # of gRPC
        raise _cannot_listen("--port", host, port, str(error).partition(";")[0]) from None
    protection = HttpAccess(certificates, access.metrics)
    try:
        http_port, http_server = serve_http(
            metrics.registry, http_host, http_port, limits, protection, pages
        )
    except OSError as error:
        raise _cannot_listen("--http-port", http_host, http_port, error.strerror) from None
    return port, http_port, http_server


def _cannot_listen(option: str, host: str, port: int, why: str | None) -> UsageError:
    """Return the error for a port, with what is known of the reason. gRPC names none."""
    with suppress(OSError), socket.create_connection((host, port), timeout=1.0):
        why = "another program listens there"
    return UsageError(
        f"{option} {port}: cannot listen on {host}: {why}; choose another (0 chooses a free one)"
    )


async def _until_stdin_closes(stop: asyncio.Event) -> None:
    """Wait for `stop` or for the end of standard input, which its writer's death closes as well."""
    loop, closed = asyncio.get_running_loop(), asyncio.Event()

    def read() -> None:
        with suppress(OSError, ValueError):  # closed, or a terminal that has gone away
            while sys.stdin and os.read(sys.stdin.fileno(), 4096):
                pass
        with suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(closed.set)

    # A thread can read anything. The event loop can wait neither for a file nor for /dev/null.
    threading.Thread(target=read, daemon=True, name="standard input").start()
    waiting = [asyncio.create_task(event.wait()) for event in (stop, closed)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


async def _until_streams_end(runs: RunRegistry) -> None:
    """Wait for all streams to end, `GRACE_SECONDS` at most.

    If the parent process has died, its run fails, and the other ranks must still be told why.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GRACE_SECONDS
    while runs.open_streams and loop.time() < deadline:
        await asyncio.sleep(0.05)
