"""Measures what the ranks' collectives cost, over the group that the steps will use.

Not covered: links of unequal speed; several collectives at once; what a decision costs.
"""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist

from switokd.planning.profile import Communication
from switokd.runtime.process_group import World, collective_errors

SMALL, LARGE = 1, 2 * 2**20
"""Values (float32) of the tensors that are added up."""
REPETITIONS = {SMALL: 30, LARGE: 7}


def measure_links(world: World, decision_seconds: float) -> Communication | None:
    """Latency and bandwidth of a sum over all ranks; every rank must call it. None for one rank.

    decision_seconds: is taken over as it is. CollectiveError if a rank is gone.
    """
    ranks = world.env.world_size
    if ranks == 1:
        return None
    small, large = (_seconds(world, size) for size in (SMALL, LARGE))
    travels = 2 * (ranks - 1) / ranks * 4 * LARGE
    return Communication(
        description=f"{world.backend} between {ranks} ranks, measured",
        latency_seconds=small,
        bandwidth_bytes_per_second=travels / max(large - small, 1e-9),
        decision_seconds=decision_seconds,
    )


def _seconds(world: World, size: int) -> float:
    """Median seconds of adding up `size` values, after a first time that does not count."""
    values = torch.zeros(size, device=world.transport or world.device)
    taken = []
    for _ in range(1 + REPETITIONS[size]):
        started = time.perf_counter()
        with collective_errors("measuring the links between ranks"):
            dist.all_reduce(values, group=world.steps)
        if values.is_cuda:
            torch.cuda.synchronize(values.device)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])
