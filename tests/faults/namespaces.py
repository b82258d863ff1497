"""Runs that live in namespaces of their own: two hosts with a bad link, and a small file system.

The hosts are two network namespaces. A process hands packets on between them, and loses some, or
all of them for a while; so the test needs no kernel module. Both ranks have torchrun's environment
variables.

Not covered: two kernels, two clocks.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from switokd.cli.worker import worker_main
from tests.faults.actions import FILLER, LINK
from tests.faults.moments import START, install
from tests.preloaded import train_ranks

NEW_MOUNTS, NEW_USERS, NEW_NETWORK = 0x00020000, 0x10000000, 0x40000000
SET_INTERFACE, TUN, NO_HEADER = 0x400454CA, 0x0001, 0x1000

ADDRESSES = ("10.83.0.1", "10.83.0.2")
PORT = "29500"
LOSS = 0.02
"""Share of all packets that are lost."""

DISK_MEGABYTES = 8
"""Room for three checkpoints and the weights."""


def two_hosts(world_size: int, arguments: tuple[str, ...]) -> None:
    """Run one rank on each of two hosts; end with the first exit code that is not 0."""
    install()
    enter(NEW_USERS | NEW_NETWORK)
    orders, wire_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    os.environ[LINK] = str(orders.fileno())
    first = interface(ADDRESSES[0])
    here, there = socket.socketpair()
    ranks = [os.fork()]
    if not ranks[0]:
        os.close(first)
        enter(NEW_NETWORK)
        socket.send_fds(there, [b"x"], [interface(ADDRESSES[1])])
        _run_rank(1, arguments)
        return
    _, (second, *_), _, _ = socket.recv_fds(here, 1, 1)
    wire = os.fork()
    if not wire:
        with suppress(OSError):  # a host is gone
            hand_on((first, second), wire_end)
        os._exit(0)
    os.close(first)
    os.close(second)
    ranks.append(os.fork())
    if not ranks[1]:
        _run_rank(0, arguments)
        return
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    os.kill(wire, signal.SIGKILL)
    os.waitpid(wire, 0)
    sys.exit(next(filter(None, codes), 0))


def on_small_disk(world_size: int, arguments: tuple[str, ...]) -> None:
    """Train in a small file system; free space and start again after a start that fails.

    Prints the exit codes, and copies the run folder to the folder `kept`.
    """
    enter(NEW_USERS | NEW_MOUNTS)
    Path("out").mkdir()
    size = f"size={DISK_MEGABYTES}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", "out"], check=True)
    code = -1
    for start in range(1, 6):
        pid = os.fork()
        if not pid:
            os.environ[START] = str(start)
            install()
            train_ranks(world_size, arguments)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(f"start {start}: exit code {code}", flush=True)
        FILLER.unlink(missing_ok=True)
        if code == 0:
            break
    shutil.copytree("out", "kept")
    sys.exit(code)


def enter(kinds: int) -> None:
    """Enter new namespaces; with a new user namespace, as its root."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(kinds):
        raise OSError(ctypes.get_errno(), "unshare")
    if kinds & NEW_USERS:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def interface(address: str, name: str = "wire0") -> int:
    """Make an interface with an address; return the descriptor that has its packets."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, SET_INTERFACE, struct.pack("16sH22x", name.encode(), TUN | NO_HEADER))
    for words in (
        f"addr add {address}/24 dev {name}",
        f"link set {name} up",
        "link set lo up",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    return descriptor


def _run_rank(rank: int, arguments: tuple[str, ...]) -> None:
    """Run a rank as torchrun would start it on a host of its own."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR=ADDRESSES[0],
        MASTER_PORT=PORT,
        GLOO_SOCKET_IFNAME="wire0",  # the host's own name leads nowhere
    )
    sys.argv = ["rank", *arguments]
    worker_main()


def hand_on(interfaces: tuple[int, int], orders: socket.socket, loss: float = LOSS) -> None:
    """Hand packets on between two interfaces until one of them is gone.

    orders: messages with the number of seconds for which the link is cut from now on. loss: share
    of the packets that are lost.
    """
    rng, cut_until = random.Random(0), 0.0
    other = dict(zip(interfaces, interfaces[::-1], strict=True))
    while True:
        readable, _, _ = select.select([*interfaces, orders.fileno()], [], [])
        for each in readable:
            if each not in other:
                cut_until = time.monotonic() + struct.unpack("d", orders.recv(8))[0]
                continue
            packet = os.read(each, 1 << 16)
            if rng.random() >= loss and time.monotonic() >= cut_until:
                os.write(other[each], packet)
