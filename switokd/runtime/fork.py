"""Starts the ranks of `switokd train` from one process that has imported PyTorch.

Forked ranks share PyTorch's code and modules in memory, and start at once. A process is forked only
while it has a single thread and has not initialised CUDA; otherwise each rank is a new process.
The store in which forked ranks meet has a thread, so it gets a forked process of its own. The
forking process stays as it is, and starts a lost job again without an import.

Not covered: what the command `switokd train` itself does (`launcher.py`); several machines.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from switokd.runtime.rank_processes import STOP_SECONDS
from switokd.runtime.rank_processes import wait_for_ranks as wait_for_ranks  # a name of both

ADDRESS = "127.0.0.1"
"""All ranks run on this machine, and its own name may not resolve."""


def can_fork() -> bool:
    """Return whether this process may be forked: Linux, one thread, no CUDA context."""
    if sys.platform != "linux" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return len(os.listdir("/proc/self/task")) == 1


def start_ranks(
    world_size: int, launcher: socket.socket, command: Sequence[str]
) -> tuple[dict[int, int], StoreProcess | TCPStore] | None:
    """Start the ranks, and return their ranks by process id, with the store in which they meet.

    Returns None in a forked rank, which has torchrun's environment variables from then on.
    launcher: connection to the launcher; only forked rank 0 keeps it. command: starts a rank that
    is not forked.
    """
    # The socket listens before the ranks start.
    listener = socket.create_server((ADDRESS, 0), backlog=max(128, 4 * world_size))
    port = listener.getsockname()[1]
    os.environ.update(
        MASTER_ADDR=ADDRESS,
        MASTER_PORT=str(port),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        TORCHELASTIC_RUN_ID=uuid.uuid4().hex,
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun sets it
    is_forking = can_fork()
    if is_forking:
        gc.collect()
        gc.freeze()  # a later collection would write to shared pages
    store = StoreProcess(listener, launcher) if is_forking else _store(listener)
    ranks: dict[int, int] = {}
    for rank in range(world_size):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if not is_forking:
            child = subprocess.Popen(list(command), env={**os.environ, **of_rank})
            ranks[child.pid] = rank
            continue
        pid = os.fork()
        if not pid:
            assert isinstance(store, StoreProcess)
            store.leave()
            if rank:
                launcher.close()
            os.environ.update(of_rank)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _name_process(f"switokd rank {rank}")
            return None
        ranks[pid] = rank
    return ranks, store


class StoreProcess:
    """A forked process that holds the store in which forked ranks meet.

    It ends on `close`, or with the process that has forked it. listener: the store's socket, which
    only the forked process keeps. launcher: a connection that it does not keep.
    """

    def __init__(self, listener: socket.socket, launcher: socket.socket) -> None:
        theirs, self._ours = socket.socketpair()
        self._pid = os.fork()
        if not self._pid:
            self.leave()
            launcher.close()
            _hold_store(listener, theirs)
        theirs.close()
        listener.close()

    def leave(self) -> None:
        """Let go of the store, in a process forked later: it must not keep the store alive."""
        self._ours.close()

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended although nobody has closed it."""
        return bool(select.select([self._ours], [], [], 0)[0])

    def close(self) -> None:
        """End the process, once the ranks have ended."""
        self._ours.close()
        os.kill(self._pid, signal.SIGKILL)  # ends it even if it is stopped
        os.waitpid(self._pid, 0)


def _hold_store(listener: socket.socket, forker: socket.socket) -> NoReturn:
    """Hold the store until the forking process ends or closes its end of the connection.

    A service manager sends SIGTERM to all processes; the ranks then still need the store.
    """
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _name_process("switokd store")
        _held = _store(listener)
        forker.recv(1)
    finally:  # run nothing of the forking process
        os._exit(0)


def _store(listener: socket.socket) -> TCPStore:
    """Return the store that serves on a listening socket; it starts a thread."""
    return TCPStore(
        host_name=ADDRESS,
        port=listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=STOP_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _name_process(name: str) -> None:
    """Set the name that `top` and `ps -o comm` show."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)
