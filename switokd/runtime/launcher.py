"""The launcher behind `switokd train`: starts the ranks of a run on this machine.

The launcher does not import PyTorch. It starts one process that imports PyTorch and forks the
ranks (`fork.py`), and works beside it: it starts the coordinator, and draws the curves. If the run
loses a rank, the process that has imported PyTorch forks the ranks again.

Not covered: several machines; there torchrun is the launcher.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

from switokd.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, PeerError
from switokd.runtime.environment import STARTED, ProcessLayout, cores, started
from switokd.runtime.interpreter import python_command
from switokd.runtime.lifecycle import (
    Terminated,
    end_group,
    ignore_sigterm,
    print_error,
    print_warning,
    unwind_on_sigterm,
)
from switokd.runtime.log import is_json, objects

LEFT_SECONDS = 2.5
"""How long the ranks may outlive the process that started them, before SIGKILL."""

RELAY_SECONDS = 1.0
"""How long the last lines of the ranks may take to be passed on."""

STUCK_SECONDS = 40.0
"""How long that process may take to end after a signal: longer than it gives the ranks."""

LONGEST_PAUSE = 30.0
"""Longest wait before a restart, in seconds: 0 before the first one, 1, 2, 4, ... before others."""


def environment_of_ranks() -> dict[str, str]:
    """Return the environment of the process that forks the ranks.

    The OpenBLAS of NumPy starts its threads when it is imported, and a process with threads cannot
    be forked. PyTorch computes with OpenBLAS on other processors than x86 only.
    """
    env = {**os.environ, STARTED: str(started())}
    if platform.machine().lower() in ("x86_64", "amd64"):
        env.setdefault("OPENBLAS_NUM_THREADS", "1")
    return env


@dataclass(frozen=True)
class Job:
    """What a launcher runs: `python -m switokd.train ARGUMENTS` once per rank."""

    world_size: int
    arguments: Sequence[str]
    layouts: Sequence[ProcessLayout]
    """Numbers of processes and threads that the ranks may choose from, if the run may continue with
    fewer processes."""
    wait_for_coordinator: Callable[[], Mapping[str, object]]
    """Called while PyTorch is imported; its result goes to every rank as JSON."""
    draw: Callable[[Path], object]
    """Called with the run folder when training is complete, while the ranks end."""
    settings_to_continue: Callable[[Path], Sequence[str]]
    """Returns what to add to the arguments, so that a run goes on in its folder."""
    max_restarts: int = 0
    """How often the ranks are started again after the run has lost a process."""


def launch(job: Job) -> int:
    """Run a job, again from its checkpoint if it loses a process; return its exit code.

    The code is 0, or that of the rank that failed first. The first restart follows at once, because
    most losses come alone; later ones wait longer and longer.
    """
    threads = max(cores() // job.world_size, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    unwind_on_sigterm()
    parent = _Parent(job)
    try:
        settings: Sequence[str] = ()
        for restart in count(1):
            code = parent.run(settings, again=restart <= job.max_restarts)
            is_over = code != PeerError.exit_code or restart > job.max_restarts
            if is_over or parent.folder is None:
                return code
            seconds = min(2.0 ** (restart - 2), LONGEST_PAUSE) if restart > 1 else 0.0
            when = f" in {seconds:g} s" if seconds else ""
            print_warning(
                f"the run has lost a process and starts again{when} from its last checkpoint "
                f"(restart {restart} of {job.max_restarts})"
            )
            time.sleep(seconds)
            settings = job.settings_to_continue(parent.folder)
    except (KeyboardInterrupt, Terminated) as stopped:
        ignore_sigterm()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        is_interrupt = isinstance(stopped, KeyboardInterrupt)
        parent.stop(signal.SIGINT if is_interrupt else signal.SIGTERM)
        return EXIT_INTERRUPTED if is_interrupt else EXIT_TERMINATED
    finally:
        parent.close()
    raise AssertionError("unreachable")


class _Parent:
    """The process that imports PyTorch and forks the ranks, and its connection.

    It is sent a line per start of the ranks, and sends lines itself:

        {"coordinator": ADDRESSES, "settings": [WORD, ...], "again": WHETHER_TO_STAY}
        {"folder": PATH}    by rank 0: the run folder
        {"draw": PATH}      by rank 0: training is complete
        {"lost": CODE}      the ranks have lost one of them, and the process waits for a line
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.folder: Path | None = None
        """The run folder, once rank 0 has made it."""
        self._has_ranks = False
        self._start()

    def _start(self) -> None:
        job = self._job
        self._connection, theirs = socket.socketpair()
        self._messages = self._connection.makefile(encoding="utf-8")
        command = [*python_command("switokd.train"), f"--fork={job.world_size}"]
        command += [f"--launcher={theirs.fileno()}"]
        if job.layouts:
            command += [f"--layouts={','.join(layout.code for layout in job.layouts)}"]
        self._process = subprocess.Popen(
            [*command, *job.arguments],
            env=environment_of_ranks(),
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C reaches the ranks only through this process
            stderr=subprocess.PIPE if is_json() else None,
        )
        theirs.close()
        self._relay = threading.Thread(target=_relay, args=(self._process.stderr,), daemon=True)
        self._relay.start()
        self._ending = threading.Thread(target=_end_ranks, args=(self._process,), daemon=True)
        self._ending.start()

    def run(self, settings: Sequence[str], again: bool) -> int:
        """Start the ranks and wait for their end; return the exit code.

        settings: added to the arguments. again: whether another start may follow.
        """
        if self._process.poll() is not None:
            self.close()
            self._start()
        start = {
            "coordinator": self._job.wait_for_coordinator(),
            "settings": list(settings),
            "again": again,
        }
        with suppress(BrokenPipeError):  # the exit code says why
            self._connection.sendall(json.dumps(start).encode() + b"\n")
        self._has_ranks = True
        for line in self._messages:
            message = json.loads(line)
            if "folder" in message:
                self.folder = Path(message["folder"])
            if "draw" in message:
                self._job.draw(Path(message["draw"]))
            if "lost" in message:
                self._has_ranks = False
                return int(message["lost"])
        code = self._process.wait()
        self._has_ranks = False
        if code < 0:
            name = signal.Signals(-code).name
            print_error(
                f"process {self._process.pid}, which started the ranks, was killed by {name}"
            )
            return PeerError.exit_code
        return code

    def stop(self, number: int) -> None:
        """Pass a signal on to the ranks, and wait for their end."""
        # Without ranks there is nothing to interrupt, and SIGTERM leaves no traceback.
        self._process.send_signal(number if self._has_ranks else signal.SIGTERM)
        _wait(self._process)

    def close(self) -> None:
        """End the process if it runs."""
        self._messages.close()
        self._connection.close()
        if self._process.poll() is None:
            self._process.terminate()
            _wait(self._process)
        self._ending.join()
        self._relay.join(RELAY_SECONDS)


def _relay(lines: IO[bytes] | None) -> None:
    """Pass on what the ranks write to standard error; what a C library writes is made an object."""
    for line in lines or ():
        for said in objects([line.decode(errors="replace")], "warning"):
            sys.stderr.write(f"{said.rstrip()}\n")
            sys.stderr.flush()


def _end_ranks(parent: subprocess.Popen[bytes]) -> None:
    """Wait for the process that started the ranks; then end those that are left.

    Its session has all of them, and their loader processes. Otherwise a rank that is stopped, and
    cannot notice that its parent is gone, would be left for ever.
    """
    parent.wait()
    end_group(parent.pid, LEFT_SECONDS)


def _wait(parent: subprocess.Popen[bytes]) -> None:
    """Wait for a process that got a signal; SIGKILL if it is stopped or hangs."""
    try:
        parent.wait(STUCK_SECONDS)
    except subprocess.TimeoutExpired:
        parent.kill()
        parent.wait()
