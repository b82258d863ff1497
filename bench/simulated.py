"""A network whose compute is a wait: simulated devices, as many as there are processes.

Everything around it is real: processes, collectives, the coordinator, the optimizer of a few
weights. As a run file's model: `bench.simulated:Waiting`.

Not covered: gradients of a real network's size, so adding them up costs next to nothing; compute
that is not proportional to the samples.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn


class Waiting(nn.Module):
    """A linear layer on the means of the channels, that takes as long as it is told."""

    def __init__(
        self,
        seconds_per_sample_forward: float,
        seconds_per_sample_backward: float,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.seconds = seconds_per_sample_forward, seconds_per_sample_backward
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_channels, H, W]` to logits `[B, num_classes]`."""
        z: Tensor = _Wait.apply(self.head(x.mean(dim=(2, 3))), *self.seconds)
        return z


class _Wait(torch.autograd.Function):
    """The identity, after a while, in both directions."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = len(z) * backward
        time.sleep(len(z) * forward)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradients[0], None, None
