"""What the coordinator takes of the system: open files, and gRPC's own limits.

Not covered: memory, processor time.
"""

from __future__ import annotations

import logging
import resource
from contextlib import suppress
from dataclasses import replace

from switokd.services.coordinator.limits import Limits, option

OWN_FILES = 64
"""Files that the process needs beside its connections: journal, listeners, event loops."""
LOOKAHEAD_BYTES = 65_536
"""Bytes after which a stream that nobody reads holds back its sender."""

SIZES = 4
"""gRPC refuses a message only above this multiple of the largest one; switokd refuses earlier."""

log = logging.getLogger(__name__)


def with_files(limits: Limits) -> Limits:
    """Return the limits with as many gRPC connections as the system allows open files.

    Raises the soft limit of open files first. If it allows fewer connections, the log says so.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.max_connections + limits.max_http_connections + OWN_FILES
    allowed = needed if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with suppress(OSError, ValueError):  # such as macOS, where no limit is no number
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed >= needed:
        return limits
    connections = max(1, allowed - limits.max_http_connections - OWN_FILES)
    log.warning(
        "the system allows this process %d open files (ulimit -Hn): it takes %d gRPC connections, "
        "not %d (%s)",
        *(allowed, connections, limits.max_connections, option("max_connections")),
    )
    return replace(limits, max_connections=connections)


def channel_options(limits: Limits) -> list[tuple[str, int]]:
    """Return the options of gRPC that hold the limits."""
    return [
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", _milliseconds(limits.handshake_seconds)),
        ("grpc.max_connection_idle_ms", _milliseconds(limits.idle_connection_seconds)),
        ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
        # The coordinator's own sentence names the option; gRPC's does not.
        ("grpc.max_receive_message_length", SIZES * limits.max_message_bytes),
        # gRPC would unpack a message of 256 KiB into 256 MiB, and then look at its size.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.per_message_decompression", 0),
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 16_384),
        # Otherwise the window of a fast stream grows, and so does what waits for a slow one.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
