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

from switokd.config import Config
from switokd.errors import EXIT_INTERRUPTED, PeerError
from switokd.lifecycle import complain


def processes_for(config: Config) -> int:
    """How many processes suit this machine where the placement fits any number.

    One per GPU. Without one, replicated takes a single process with all cores, and auto one per
    core.
    """
    from switokd.world import gpu_count

    gpus = 0 if config.device == "cpu" else gpu_count()
    return gpus or (1 if config.placement == "replicated" else os.cpu_count() or 1)


def launch(config: Config, world_size: int, arguments: Sequence[str]) -> int:
    """Run `python -m switokd.train ARGUMENTS` once per rank; return the exit code.

    That is 0, or the code of the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each rank has said in a line why it ended; torchrun's account would bury it.
    logging.disable(logging.ERROR)
    threads = max((os.cpu_count() or 1) // world_size, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(launcher, sys.executable)("-u", "-m", "switokd.train", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        who = config.who(rank, world_size)
        killed_by = signal.Signals(-failure.exitcode).name
        complain(f"{who}, process {failure.pid}, was killed by {killed_by}")
        return PeerError.exit_code
    except (KeyboardInterrupt, SignalException) as stopped:
        number = getattr(stopped, "sigval", signal.SIGINT)
        return EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number
    return 0
