"""Runs the blocks of a page on machines with names: network namespaces with an address each.

A block with the comment `<!-- on: gpu1 -->` is a command of the machine gpu1, with the folder gpu1
as its own. A block waits for the end of the one before it only if both are of the same machine.

Not covered: two kernels; a firewall.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.faults.namespaces import (
    NEW_MOUNTS,
    NEW_NETWORK,
    NEW_USERS,
    enter,
    hand_on,
    interface,
)

ADDRESSES = {"gpu1": "10.84.0.1", "gpu2": "10.84.0.2"}
COPIED = ("certs/ca.crt", "certs/worker.token")
"""What the page lets its reader copy from the first machine to the second one."""
BLOCK_SECONDS = 240


def run_on_machines(listed: Path) -> None:
    """Run blocks of (machine, line, code); RuntimeError for the first one that fails."""
    enter(NEW_USERS | NEW_NETWORK | NEW_MOUNTS)
    hosts = Path("hosts")
    hosts.write_text("".join(f"{a} {name}.example.org\n" for name, a in ADDRESSES.items()))
    subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
    second = _connect()
    prefixes: dict[str, list[str]] = {
        "gpu1": [],
        "gpu2": ["nsenter", f"--net=/proc/{second}/ns/net"],
    }
    running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
    for machine, line, code in json.loads(listed.read_text()):
        folder = Path(machine)
        folder.mkdir(exist_ok=True)
        if machine in running:
            _finish(*running.pop(machine))
        if machine == "gpu2":
            (folder / "certs").mkdir(exist_ok=True)
            for name in COPIED:
                shutil.copy(Path("gpu1") / name, folder / name)
        command = [*prefixes[machine], "bash", "-euc", code]
        running[machine] = line, subprocess.Popen(command, cwd=folder)
        if code.rstrip().endswith("&"):  # whatever follows needs what this starts
            _finish(*running.pop(machine))
    for each in running.values():
        _finish(*each)


def _connect() -> int:
    """Give this process the first address, and start one with the second address.

    Returns the id of that process. A third one hands packets on between them.
    """
    first = interface(ADDRESSES["gpu1"], "eth0")
    here, there = socket.socketpair()
    second = os.fork()
    if not second:
        os.close(first)
        enter(NEW_NETWORK)
        socket.send_fds(there, [b"x"], [interface(ADDRESSES["gpu2"], "eth0")])
        while True:
            signal.pause()
    _, (other, *_), _, _ = socket.recv_fds(here, 1, 1)
    orders, _end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    if not os.fork():
        with suppress(OSError):  # a machine is gone
            hand_on((first, other), orders, 0.0)
        os._exit(0)
    os.close(first)
    os.close(other)
    return second


def _finish(line: int, block: subprocess.Popen[bytes]) -> None:
    code = block.wait(BLOCK_SECONDS)
    if code:
        raise RuntimeError(f"the block of line {line} ends with {code}")
