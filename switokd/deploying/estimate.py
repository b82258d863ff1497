"""The memory that a pod needs, estimated by one training step on random images.

Torch is imported when an estimate is made.

Not covered: memory of the user's own data set; what an allocator holds without using it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from switokd.config.config import Config
from switokd.data.catalog import DOWNLOADABLE, known
from switokd.deploying.facts import PodShape
from switokd.errors import UsageError

if TYPE_CHECKING:
    from switokd.planning.dry_run import NetworkReport

GIBIBYTE = 2**30
CPU_PROCESS, GPU_PROCESS, LOADER_PROCESS = 1.0, 4.0, 0.5
"""GiB of a process that has imported PyTorch; with CUDA's context and pinned memory; of a process
that loads images."""


class Estimate(NamedTuple):
    """Memory in GiB."""

    pod: float
    """Of a pod's processes, without what GPUs hold."""
    gpu: float
    """Of the networks on the fullest rank, which a GPU must hold."""


def estimate(config: Config, shape: PodShape) -> Estimate:
    """Estimate the memory; UsageError if the run file cannot train."""
    from switokd.planning.dry_run import dry_run

    result = dry_run(config, batch=4)
    if result.problems:
        hint = "--memory SIZE leaves the estimate out"
        raise UsageError("\n".join(f"{config.name}: {p}; {hint}" for p in result.problems))
    networks = {report.name: report for report in result.networks}
    by_rank = _by_rank(config, shape, networks)
    state = sum(12 * report.parameters for report in networks.values()) / GIBIBYTE
    data = _data(config)
    of_pods = []
    for pod in range(shape.pods):
        ranks = range(pod * shape.ranks_per_pod, (pod + 1) * shape.ranks_per_pod)
        process = GPU_PROCESS if shape.gpus_per_pod else CPU_PROCESS
        process += data + config.data.workers * LOADER_PROCESS
        own = 0.0 if shape.gpus_per_pod else sum(by_rank[rank] for rank in ranks)
        of_pods.append(len(ranks) * process + own)
    # Rank 0 collects the state of all networks for a checkpoint.
    return Estimate(max(of_pods) + state, max(by_rank))


def _by_rank(config: Config, shape: PodShape, networks: dict[str, NetworkReport]) -> list[float]:
    """Return the GiB of the networks of each rank; with placement: auto, of all networks."""
    if config.placement == "auto":
        return [sum(r.memory_bytes for r in networks.values()) / GIBIBYTE] * shape.world_size
    placement = config.placement_on(shape.world_size)
    return [
        sum(networks[name].memory_bytes for name in placement.networks_of(rank)) / GIBIBYTE
        for rank in range(shape.world_size)
    ]


def _data(config: Config) -> float:
    """Return the GiB of a data set that every rank holds in memory."""
    catalogued = known(config.data)
    if catalogued is None or config.data.dataset not in ("digits", *DOWNLOADABLE):
        return 0.0
    return 2 * catalogued.samples * math.prod(catalogued.image) / GIBIBYTE
