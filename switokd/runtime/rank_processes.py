"""Waits for the ranks that this process has started, and ends them together.

Imported without torch.

Not covered: starting ranks (`fork.py`, `cli/pod_ranks.py`).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from switokd.errors import EXIT_INTERRUPTED, PeerError
from switokd.runtime.lifecycle import print_error

POLL_SECONDS = 0.05
"""How often the ranks are checked."""

CAUSE_SECONDS = 0.5
"""How long a rank that was noticed as lost may take to end by itself."""

STOP_SECONDS = 30.0
"""How long a rank that is asked to end may take, before SIGKILL: it saves a checkpoint."""

FAILED_SECONDS = 2.5
"""How long a rank may take to end after another one has failed, before SIGKILL. A rank that is
stopped (SIGSTOP) ends only by SIGKILL."""


class StoreHolder(Protocol):
    """The process that holds the store in which the ranks meet."""

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended although nobody has closed it."""


class _Stopped(BaseException):
    """A signal that stops the run."""

    def __init__(self, number: int) -> None:
        self.number = number


def wait_for_ranks(
    ranks: dict[int, int],
    launcher: socket.socket | None,
    who: Callable[[int], str],
    store: StoreHolder | None = None,
) -> int:
    """Wait until all ranks have ended, and return the exit code of the run.

    After the first failure the other ranks get SIGTERM. SIGINT and SIGTERM are passed on to the
    ranks. ranks: rank by process id. who: describes a rank in the message of a rank that was
    killed. store: if it is gone, the ranks are stopped. launcher: if it is gone, the ranks get
    SIGTERM as well; None: this process is the launcher.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, signal.SIG_IGN)
        raise _Stopped(number)

    running, parent = dict(ranks), os.getppid()
    try:
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, on_signal)
        while running:
            readable, _, _ = select.select([launcher] if launcher else [], [], [], POLL_SECONDS)
            if launcher and readable and not launcher.recv(1):
                print_error(f"the launcher (process {parent}) is gone")
                _stop(running, signal.SIGTERM, FAILED_SECONDS)
                return PeerError.exit_code
            if store is not None and store.is_gone:
                print_error("the process that holds the store of the ranks is gone")
                _stop(running, signal.SIGTERM, FAILED_SECONDS)
                return PeerError.exit_code
            failures = _failures(running)
            if failures:
                # A killed rank is the cause of the others' failures, a lost peer the consequence.
                pid = min(
                    failures,
                    key=lambda pid: (failures[pid] > 0, failures[pid] == PeerError.exit_code),
                )
                if failures[pid] < 0:
                    name = signal.Signals(-failures[pid]).name
                    print_error(f"{who(ranks[pid])}, process {pid}, was killed by {name}")
                _stop(running, signal.SIGTERM, FAILED_SECONDS)
                return failures[pid] if failures[pid] > 0 else PeerError.exit_code
    except _Stopped as stopped:
        _stop(running, stopped.number, STOP_SECONDS)
        is_interrupt = stopped.number == signal.SIGINT
        return EXIT_INTERRUPTED if is_interrupt else 128 + stopped.number
    return 0


def _failures(running: dict[int, int]) -> dict[int, int]:
    """Return the exit codes of the processes that have failed since the last call.

    If they only report a lost peer, this waits up to `CAUSE_SECONDS` for that peer's exit code.
    """
    failures: dict[int, int] = {}
    deadline = time.monotonic() + CAUSE_SECONDS
    while True:
        failures |= {pid: code for pid, code in _ended(running).items() if code}
        is_cause_known = any(code != PeerError.exit_code for code in failures.values())
        if not failures or is_cause_known or not running or time.monotonic() > deadline:
            return failures
        time.sleep(POLL_SECONDS / 5)


def _ended(running: dict[int, int]) -> dict[int, int]:
    """Remove the processes that have ended; return their exit codes, -N after signal N."""
    codes = {}
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
            del running[pid]
    return codes


def _stop(running: dict[int, int], number: int, seconds: float) -> None:
    """Send a signal to the ranks, and SIGKILL to those that do not end in time.

    seconds: how long they may take. Once one of them has ended unfinished, the others need not save
    anything, and may take `FAILED_SECONDS`.
    """
    for signal_number in (number, signal.SIGKILL):
        for pid in running:
            os.kill(pid, signal_number)
        deadline = time.monotonic() + seconds
        while running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            if any(_ended(running).values()):
                deadline = min(deadline, time.monotonic() + FAILED_SECONDS)
