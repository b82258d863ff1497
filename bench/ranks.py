"""Ranks as forked processes: real collectives and a real coordinator, with a fast start.

Sixteen Python processes that import PyTorch keep two cores busy for half a minute. Here one process
imports PyTorch, and every rank is a fork of it. PyTorch computes nothing before the fork.

Not covered: figures of compute, which start `switokd train` like a user.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.runs import RunResult, read

PRELOADED = ["switokd.training.trainer", "bench.ranks", "matplotlib.figure"]
"""Modules to import before the fork, so that the ranks need not import them."""
Body = Callable[[Path, Mapping[str, Any]], None]
"""Function that every rank runs, with a folder that all ranks share, and the arguments."""


def run(body: Body, world_size: int, arguments: Mapping[str, Any], folder: Path) -> None:
    """Run `body` on `world_size` ranks and wait. RuntimeError with the output of a failed rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(body, rank, world_size, port, arguments, folder))
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            rank.start()
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            time.sleep(0.02)
        failed = {i: rank.exitcode for i, rank in enumerate(ranks) if rank.exitcode}
    finally:
        for rank in ranks:
            rank.kill()  # no effect on an ended process
    for rank in ranks:
        rank.join()
    if failed:
        logs = [(folder / f"rank{i}.log").read_text()[-2000:] for i in failed]
        raise RuntimeError("\n".join([f"ranks ended with codes {failed}", *logs]))


def train(config: Mapping[str, Any], world_size: int) -> RunResult:
    """Train a run file on `world_size` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run(_train, world_size, config, Path(folder))
        return read(Path(folder) / "out")


def _rank(
    body: Body,
    rank: int,
    world_size: int,
    port: int,
    arguments: Mapping[str, Any],
    folder: Path,
) -> None:
    import torch

    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    body(folder, arguments)
    sys.stdout.flush()


def _train(folder: Path, arguments: Mapping[str, Any]) -> None:
    from switokd.config.config import Config
    from switokd.runtime.environment import environment
    from switokd.worker import train

    config = Config.model_validate_json(json.dumps({**arguments, "run_dir": str(folder / "out")}))
    train(config, environment(os.environ))
