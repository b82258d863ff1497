"""The exchange of a step against a bare all_gather of the same tensors, over Gloo or NCCL.

The times of a small and a large all-reduce are measured too (`switokd.planning.measure_links`).

Not covered: several machines. It has never run over NCCL, because there was no second GPU.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from bench import ranks
from bench.runs import BATCH, CLASSES
from switokd.planning.measure_links import measure_links
from switokd.runtime.environment import environment
from switokd.runtime.placement import LocalPlacement, Placement
from switokd.runtime.process_group import join_world
from switokd.training.exchange import HEADER, Exchange, all_gather

CALLS = 100
"""Exchanges per round and side."""


def exchange(
    count: int, device: str, rounds: int
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Seconds of (our exchange, a bare all_gather) by round, and the measured links.

    count: number of ranks. device: "cpu" or "cuda".
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"rounds": rounds, "device": device}
        ranks.run(exchange_ranks, count, arguments, Path(folder))
        result = json.loads((Path(folder) / "result.json").read_text())
    return [(ours, bare) for ours, bare in result["pairs"]], result["links"]


def exchange_ranks(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Body of one rank: measure our exchange and a bare all_gather alternately."""
    env = environment(os.environ)
    kind = arguments["device"]
    device = torch.device(kind, env.local_rank) if kind == "cuda" else torch.device(kind)
    with join_world(env, device, 60) as world:
        link = measure_links(world, decision_seconds=0.0)
        placement = Placement.of({f"n{i}": [i] for i in range(env.world_size)})
        exchange = Exchange(LocalPlacement(placement, env.rank), "0" * 12, CLASSES, world.steps)
        z = torch.randn(BATCH, CLASSES, device=device)
        y = torch.arange(BATCH, device=device) % CLASSES
        of_rank = torch.cat([z.flatten(), z.new_zeros(2 * BATCH + 2 * HEADER)])
        of_all = of_rank.new_empty(env.world_size * len(of_rank))

        def ours(step: int) -> None:
            gathered = exchange(step, {f"n{env.rank}": z}, {f"n{env.rank}": y}, BATCH)
            exchange.check(gathered.health.tolist())

        def bare(step: int) -> None:
            all_gather(of_all, of_rank, group=world.steps)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        rounds = 1 + arguments["rounds"]  # the first one warms up
        pairs = [[_median_seconds(side) for side in (ours, bare)] for _ in range(rounds)]
        dist.barrier()
        if env.rank == 0:
            result = {"pairs": pairs[1:], "links": link.model_dump() if link else {}}
            (folder / "result.json").write_text(json.dumps(result))


def _median_seconds(side: Callable[[int], None]) -> float:
    taken = []
    for step in range(CALLS):
        started = time.perf_counter()
        side(step)
        taken.append(time.perf_counter() - started)
    return median(taken)
