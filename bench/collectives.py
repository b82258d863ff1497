"""The exchange of a step against a bare all_gather of the same tensors, over Gloo or NCCL.

Beside them what a small and a large sum cost (`switokd.planning.measure_links`).

Not covered: several machines. Over NCCL it has never run, for want of a second GPU.
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
from switokd.training.exchange import Exchange, all_gather

CALLS = 100
"""Exchanges per round and side."""


def exchange(
    count: int, device: str, rounds: int
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Seconds of ours and of a bare all_gather, by round; the links that are measured beside."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"rounds": rounds, "device": device}
        ranks.run(exchange_ranks, count, arguments, Path(folder))
        found = json.loads((Path(folder) / "found.json").read_text())
    return [(ours, bare) for ours, bare in found["pairs"]], found["links"]


def exchange_ranks(folder: Path, arguments: Mapping[str, Any]) -> None:
    """One of the ranks, which exchange in turn through ours and through a bare all_gather."""
    env = environment(os.environ)
    kind = arguments["device"]
    device = torch.device(kind, env.local_rank) if kind == "cuda" else torch.device(kind)
    with join_world(env, device, 60) as world:
        link = measure_links(world, decision_seconds=0.0)
        placement = Placement.of({f"n{i}": [i] for i in range(env.world_size)})
        exchange = Exchange(LocalPlacement(placement, env.rank), "0" * 12, CLASSES, world.steps)
        z = torch.randn(BATCH, CLASSES, device=device)
        y = torch.arange(BATCH, device=device) % CLASSES
        mine = torch.cat([z.flatten(), z.new_zeros(2 * BATCH + 4)])
        everyone = mine.new_empty(env.world_size * len(mine))

        def ours(step: int) -> None:
            gathered = exchange(step, {f"n{env.rank}": z}, {f"n{env.rank}": y}, BATCH)
            exchange.check(gathered.health.tolist())

        def bare(step: int) -> None:
            all_gather(everyone, mine, group=world.steps)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        rounds = 1 + arguments["rounds"]  # the first one warms up
        pairs = [[_median_seconds(side) for side in (ours, bare)] for _ in range(rounds)]
        dist.barrier()
        if env.rank == 0:
            found = {"pairs": pairs[1:], "links": link.model_dump() if link else {}}
            (folder / "found.json").write_text(json.dumps(found))


def _median_seconds(side: Callable[[int], None]) -> float:
    taken = []
    for step in range(CALLS):
        started = time.perf_counter()
        side(step)
        taken.append(time.perf_counter() - started)
    return median(taken)
