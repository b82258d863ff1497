"""The launcher behind `switokd train`: starts the ranks of a run on this machine.

The launcher does not import PyTorch. It starts one process that imports PyTorch and forks the
ranks (`fork.py`), and works beside it: it starts the coordinator, and draws the curves.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from switokd.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, PeerError
from switokd.runtime.environment import STARTED, ProcessLayout, cores, started
from switokd.runtime.lifecycle import Terminated, ignore_sigterm, print_error, unwind_on_sigterm


def environment_of_ranks() -> dict[str, str]:
    """Return the environment of the process that forks the ranks.

    The OpenBLAS of NumPy starts its threads when it is imported, and a process with threads cannot
    be forked. PyTorch computes with OpenBLAS on other processors than x86 only.
    """
    env = {**os.environ, STARTED: str(started())}
    if platform.machine().lower() in ("x86_64", "amd64"):
        env.setdefault("OPENBLAS_NUM_THREADS", "1")
    return env


def launch(
    world_size: int,
    arguments: Sequence[str],
    layouts: Sequence[ProcessLayout],
    wait_for_coordinator: Callable[[], Mapping[str, object]],
    draw: Callable[[Path], object],
) -> tuple[int, Path | None]:
    """Run `python -m switokd.train ARGUMENTS` once per rank; return exit code and run folder.

    The folder is None if the ranks have not made one. The code is 0, or that of the rank that
    failed first. layouts: numbers of processes and threads that the ranks may choose from, if the
    run may continue with fewer processes.
    wait_for_coordinator: called while PyTorch is imported; its result goes to every rank as JSON.
    draw: called with the run folder when training is complete, while the ranks end.
    """
    threads = max(cores() // world_size, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    connection, ranks_end = socket.socketpair()
    command = [sys.executable, "-u", "-m", "switokd.train", f"--fork={world_size}"]
    command += [f"--launcher={ranks_end.fileno()}"]
    command += [f"--layouts={','.join(layout.code for layout in layouts)}"] if layouts else []
    unwind_on_sigterm()
    parent = subprocess.Popen(
        [*command, *arguments],
        env=environment_of_ranks(),
        pass_fds=[ranks_end.fileno()],
        start_new_session=True,  # Ctrl-C reaches the ranks only through this process
    )
    ranks_end.close()
    is_started, folder = False, None
    try:
        with suppress(BrokenPipeError):  # the exit code says why
            connection.sendall(json.dumps(wait_for_coordinator()).encode() + b"\n")
        is_started = True
        with connection.makefile(encoding="utf-8") as messages:
            for line in messages:  # until the ranks end
                message = json.loads(line)
                if "folder" in message:
                    folder = Path(message["folder"])
                if "draw" in message:
                    draw(Path(message["draw"]))
        code = parent.wait()
    except (KeyboardInterrupt, Terminated) as stopped:
        ignore_sigterm()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        is_interrupt = isinstance(stopped, KeyboardInterrupt)
        # Without ranks there is nothing to interrupt, and SIGTERM leaves no traceback.
        parent.send_signal(signal.SIGINT if is_interrupt and is_started else signal.SIGTERM)
        parent.wait()
        return (EXIT_INTERRUPTED if is_interrupt else EXIT_TERMINATED), folder
    finally:
        connection.close()
        if parent.poll() is None:
            parent.terminate()
            parent.wait()
    if code < 0:
        name = signal.Signals(-code).name
        print_error(f"process {parent.pid}, which started the ranks, was killed by {name}")
        return PeerError.exit_code, folder
    return code, folder
