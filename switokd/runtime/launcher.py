"""`switokd train` on one machine: starts a process per rank, as torchrun would.

Not covered: several machines; there torchrun itself is the launcher.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from switokd.config.config import Config
from switokd.errors import EXIT_INTERRUPTED, PeerError
from switokd.runtime.environment import ProcessLayout, cores
from switokd.runtime.lifecycle import print_error
from switokd.runtime.threads import stay_within_limits


def processes_for(config: Config) -> tuple[int, list[ProcessLayout]]:
    """How many processes suit this machine where the placement fits any number, and the crews.

    One per GPU; a single one where no coordinator is wanted. Without GPUs replicated takes one with
    all cores, and `placement: auto` has crews to choose from: a process per core, if a batch has
    enough for all networks on all of them; then half as many and so on, down to one with all cores.
    """
    if config.coordinator.address == "off":
        return 1, []
    gpus = _gpus(config)
    if gpus or config.placement != "auto":
        return gpus or 1, []
    layouts = _layouts(config)
    return layouts[0].processes, layouts


def _layouts(config: Config) -> list[ProcessLayout]:
    """Largest first; with the threads that `launch` and PyTorch give to so many processes."""
    import torch

    stay_within_limits()
    most, own_threads = cores(), torch.get_num_threads()
    are_given = "OMP_NUM_THREADS" in os.environ  # for each process, however many there are
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
    config: Config, world_size: int, arguments: Sequence[str], layouts: Sequence[ProcessLayout] = ()
) -> int:
    """Run `python -m switokd.train ARGUMENTS` once per rank; return the exit code.

    That is 0, or the code of the rank that failed first. crews: what the ranks may choose from
    instead, if they need not all go on.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each rank has said in a line why it ended; torchrun's account would bury it.
    logging.disable(logging.ERROR)
    threads = max(cores() // world_size, 1)
    options = [f"--layouts={','.join(each.code for each in layouts)}"] if layouts else []
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",  # a machine's own name need not lead anywhere
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(launcher, sys.executable)("-u", "-m", "switokd.train", *options, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        who = config.who(rank, world_size)
        killed_by = signal.Signals(-failure.exitcode).name
        print_error(f"{who}, process {failure.pid}, was killed by {killed_by}")
        return PeerError.exit_code
    except (KeyboardInterrupt, SignalException) as stopped:
        number = getattr(stopped, "sigval", signal.SIGINT)
        return EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number
    return 0
