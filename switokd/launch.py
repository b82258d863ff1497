"""`switokd train` on one machine: starts a process per network, as torchrun would.

Not covered: several machines; there torchrun itself is the launcher.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from switokd.errors import EXIT_INTERRUPTED, PeerError
from switokd.lifecycle import complain
from switokd.placement import Placement


def launch(placement: Placement, arguments: Sequence[str]) -> int:
    """Run `python -m switokd.train ARGUMENTS` once per rank; return the exit code.

    That is 0, or the code of the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each rank has said in a line why it ended; torchrun's account would bury it.
    logging.disable(logging.ERROR)
    threads = max((os.cpu_count() or 1) // placement.world_size, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=placement.world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "switokd.train", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        who = f"rank {rank} ({placement.network_of[rank]}, process {failure.pid})"
        complain(f"{who} was killed by {signal.Signals(-failure.exitcode).name}")
        return PeerError.exit_code
    except (KeyboardInterrupt, SignalException) as stopped:
        number = getattr(stopped, "sigval", signal.SIGINT)
        return EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number
    return 0
