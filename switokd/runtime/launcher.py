"""The launcher behind `switokd train`: starts the ranks of a run on this machine.

The launcher does not import PyTorch. It starts one process that imports PyTorch and forks the
ranks (`fork.py`), and works beside it: it starts the coordinator, and draws the curves.

Not covered: several machines; there torchrun is the launcher.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from switokd.config.config import Config
from switokd.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, PeerError
from switokd.runtime.environment import ProcessLayout, cores
from switokd.runtime.lifecycle import Terminated, ignore_sigterm, print_error, unwind_on_sigterm
from switokd.runtime.threads import stay_within_limits


def processes_for(config: Config) -> tuple[int, list[ProcessLayout]]:
    """Return the number of processes for a placement that allows any number, and the layouts.

    A run without coordinator gets one process; a run on GPUs gets one process per GPU. On CPUs,
    `placement: replicated` gets one process with all cores. `placement: auto` gets layouts: one
    process per core, half as many, and so on, down to one process with all cores. Every process
    must have at least two samples of a batch.
    """
    if config.coordinator.address == "off":
        return 1, []
    gpus = _gpus(config)
    if gpus or config.placement != "auto":
        return gpus or 1, []
    layouts = _layouts(config)
    return layouts[0].processes, layouts


def _layouts(config: Config) -> list[ProcessLayout]:
    """Return layouts, largest first, with the threads that `launch` and PyTorch will set."""
    import torch

    stay_within_limits()
    most, own_threads = cores(), torch.get_num_threads()
    are_given = "OMP_NUM_THREADS" in os.environ  # threads of each process
    processes = max(most // own_threads, 1) if are_given else most
    processes = min(processes, config.data.batch_size // 2)
    layouts = []
    while processes:
        is_free = processes > 1 and not are_given
        layouts.append(ProcessLayout(processes, most // processes if is_free else own_threads))
        processes //= 2
    return layouts


def _gpus(config: Config) -> int:
    from switokd.runtime.device import gpu_count

    return 0 if config.device == "cpu" else gpu_count()


def launch(
    world_size: int,
    arguments: Sequence[str],
    layouts: Sequence[ProcessLayout],
    wait_for_coordinator: Callable[[], Sequence[object]],
    draw: Callable[[Path], object],
) -> int:
    """Run `python -m switokd.train ARGUMENTS` once per rank; return the exit code of the run.

    The code is 0, or that of the rank that failed first. layouts: numbers of processes and threads
    that the ranks may choose from, if the run may continue with fewer processes.
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
        pass_fds=[ranks_end.fileno()],
        start_new_session=True,  # Ctrl-C reaches the ranks only through this process
    )
    ranks_end.close()
    is_started = False
    try:
        with suppress(BrokenPipeError):  # the exit code says why
            connection.sendall(json.dumps(wait_for_coordinator()).encode() + b"\n")
        is_started = True
        with connection.makefile(encoding="utf-8") as messages:
            folder = messages.readline()  # empty if the run fails
        if folder:
            draw(Path(json.loads(folder)))
        code = parent.wait()
    except (KeyboardInterrupt, Terminated) as stopped:
        ignore_sigterm()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        is_interrupt = isinstance(stopped, KeyboardInterrupt)
        # Without ranks there is nothing to interrupt, and SIGTERM leaves no traceback.
        parent.send_signal(signal.SIGINT if is_interrupt and is_started else signal.SIGTERM)
        parent.wait()
        return EXIT_INTERRUPTED if is_interrupt else EXIT_TERMINATED
    finally:
        connection.close()
        if parent.poll() is None:
            parent.terminate()
            parent.wait()
    if code < 0:
        name = signal.Signals(-code).name
        print_error(f"process {parent.pid}, which started the ranks, was killed by {name}")
        return PeerError.exit_code
    return code
