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
    """Raise UsageError if compute.batch_norm=sync is set and PyTorch does not support it here."""
    shared = [name for name in placement.networks if len(placement.ranks_of(name)) > 1]
    if config.compute.batch_norm == "sync" and shared and world.backend != "nccl":
        raise UsageError(
            f"compute.batch_norm: sync needs a GPU of its own for each rank of {shared[0]}; use "
            "batch_norm=rank, or one rank per network"
        )


def average_statistics(
    learner: Learner, model: nn.Module, share: float, transport: torch.device | None
) -> None:
    """Average the running statistics of a network's norms over its ranks, before evaluation.

    This covers BatchNorm, and InstanceNorm with running statistics.

    model: the trained model, or its moving average. share: this rank's share of each batch, the
    weight of its statistics. transport: device that the collective needs its tensors on; None: the
    model's device.
    """
    group = learner.optimizer_step.reducer.group
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    statistics = [s for m in norms for s in (m.running_mean, m.running_var) if s is not None]
    if group is None or not statistics or learner.frozen:
        return
    flat = share * torch.cat([s.reshape(-1) for s in statistics])
    flat = flat if transport is None else flat.to(transport)
    with collective_errors(f"averaging the BatchNorm statistics of {learner.name}"):
        dist.all_reduce(flat, group=group)
    parts = torch.split(flat, [s.numel() for s in statistics])
    for buffer, part in zip(statistics, parts, strict=True):
        buffer.copy_(part.view(buffer.shape))
