"""The TCP connections of a pod, read from the kernel's tables.

Not covered: UDP; connections that are too short to be seen.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ESTABLISHED, LISTENING = 1, 10


class Flow(NamedTuple):
    """A connection, by the address of its client, and address and port of its server."""

    client: str
    server: str
    port: int


def flows_of(process: int, address: str) -> set[Flow]:
    """The connections from elsewhere that are open at a pod. process: one in the pod."""
    rows = []
    for table in ("tcp", "tcp6"):
        with suppress(OSError):  # the process has ended
            text = Path(f"/proc/{process}/net/{table}").read_text()
            rows += [line.split()[1:4] for line in text.splitlines()[1:]]
    listening = {_port(local) for local, _, state in rows if int(state, 16) == LISTENING}
    return {
        Flow(_address(remote), address, _port(local))
        for local, remote, state in rows
        if int(state, 16) == ESTABLISHED
        and _port(local) in listening
        and _address(remote) != _address(local)
    }


def _port(field: str) -> int:
    return int(field.partition(":")[2], 16)


def _address(field: str) -> str:
    """The IPv4 address of a field; also of one in the form ::ffff:a.b.c.d."""
    number = field.partition(":")[0][-8:]
    return socket.inet_ntoa(struct.pack("<I", int(number, 16)))
