"""A network whose compute is a wait: simulated devices, as many as there are processes.

Everything around it is real: processes, collectives, the coordinator, the optimizer of a few
weights. As a run file's model: `bench.simulated:Waiting`.

Not covered: compute that is not proportional to the samples.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = 16
"""Parts of a network with weights of its own."""


class WaitingTimes(nn.Module):
    """A linear layer on the means of the channels, that takes as long as it is told.

    parameters: how many weights it has besides. They do nothing, but their gradients (zeros) arrive
    over the time of backward, in `LAYERS` parts, and have to be added up like a real network's.
    """

    def __init__(
        self,
        seconds_per_sample_forward: float,
        seconds_per_sample_backward: float,
        in_channels: int = 3,
        num_classes: int = 10,
        parameters: int = 0,
    ) -> None:
        super().__init__()
        layers = LAYERS if parameters else 1
        self.seconds = seconds_per_sample_forward / layers, seconds_per_sample_backward / layers
        self.head = nn.Linear(in_channels, num_classes)
        sizes = [parameters // layers] * layers if parameters else []
        self.layers = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_channels, H, W]` to logits `[B, num_classes]`."""
        z: Tensor = self.head(x.mean(dim=(2, 3)))
        for weights in self.layers or [None]:
            z = _Wait.apply(z, weights, *self.seconds)
        return z


class _Wait(torch.autograd.Function):
    """The identity, after a while, in both directions."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weights: Tensor | None, forward: float, backward: float
    ) -> Tensor:
        ctx.seconds = len(z) * backward
        ctx.weights = weights
        time.sleep(len(z) * forward)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        time.sleep(ctx.seconds)
        own = None if ctx.weights is None else torch.zeros_like(ctx.weights)
        return gradients[0], own, None, None
