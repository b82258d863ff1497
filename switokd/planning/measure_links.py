"""Measures latency and bandwidth of collectives, over the process group of the training steps.

Not covered: links of unequal speed; several collectives at the same time; the delay of a decision.
"""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist

from switokd.planning.profile import Communication
from switokd.runtime.process_group import World, collective_errors

SMALL, LARGE = 1, 2 * 2**20
"""Sizes of the all-reduced tensors, in float32 values."""
REPETITIONS = {SMALL: 30, LARGE: 7}


def measure_links(world: World, decision_seconds: float) -> Communication | None:
    """Measure latency and bandwidth of an all-reduce over all ranks; None if there is one rank.

    Every rank must call it. decision_seconds: copied into the result.
    Raises CollectiveError if a rank is lost.
    """
    ranks = world.env.world_size
    if ranks == 1:
        return None
    small, large = (_seconds(world, size) for size in (SMALL, LARGE))
    sent = 2 * (ranks - 1) / ranks * 4 * LARGE  # bytes per rank in a ring all-reduce
    return Communication(
        description=f"{world.backend} between {ranks} ranks, measured",
        latency_seconds=small,
        bandwidth_bytes_per_second=sent / max(large - small, 1e-9),
        decision_seconds=decision_seconds,
    )


def _seconds(world: World, size: int) -> float:
    """Return the median seconds of an all-reduce of `size` values; a first one is not counted."""
    values = torch.zeros(size, device=world.transport or world.device)
    durations = []
    for _ in range(1 + REPETITIONS[size]):
        started = time.perf_counter()
        with collective_errors("measuring the links between ranks"):
            dist.all_reduce(values, group=world.steps)
        if values.is_cuda:
            torch.cuda.synchronize(values.device)
        durations.append(time.perf_counter() - started)
    return median(durations[1:])
