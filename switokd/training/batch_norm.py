"""BatchNorm of a network on several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from switokd.config.config import Config
from switokd.errors import UsageError
from switokd.runtime.placement import Placement
from switokd.runtime.process_group import World, collective_errors
from switokd.training.learner import Learner


def check_batch_norm(config: Config, placement: Placement, world: World) -> None:
    """UsageError if statistics over several ranks are asked for where PyTorch has none."""
    shared = [name for name in placement.networks if len(placement.ranks_of(name)) > 1]
    if config.compute.batch_norm == "sync" and shared and world.backend != "nccl":
        raise UsageError(
            f"compute.batch_norm: sync needs a GPU of its own for each rank of {shared[0]}; use "
            "batch_norm=rank, or one rank per network"
        )


def average_statistics(
    learner: Learner, model: nn.Module, share: float, transport: torch.device | None
) -> None:
    """Give all of a network's ranks the mean of the statistics that their norms keep.

    They evaluate alike then. BatchNorm's are such, and InstanceNorm's where it keeps any.

    model: the learner's own, or its moving average. share: this rank's part of each batch, which
    weights its statistics.
    """
    group = learner.gradients.group
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    found = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    if group is None or not found or learner.frozen:
        return
    flat = share * torch.cat([b.reshape(-1) for b in found])
    flat = flat if transport is None else flat.to(transport)
    with collective_errors(f"averaging the BatchNorm statistics of {learner.name}"):
        dist.all_reduce(flat, group=group)
    for buffer, part in zip(found, torch.split(flat, [b.numel() for b in found]), strict=True):
        buffer.copy_(part.view(buffer.shape))
