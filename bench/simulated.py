"""A network that waits instead of computing, to simulate one device per process.

Everything else is real: processes, collectives, the coordinator, the optimizer of a few weights.
In a run file: `model: bench.simulated:SimulatedNetwork`.

Not covered: compute time that is not proportional to the number of samples.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = 16
"""Number of layers with weights."""


class SimulatedNetwork(nn.Module):
    """A linear layer on the channels' means, with a given duration of forward and backward pass.

    parameters: number of additional weights. They have no effect, but their gradients (zeros)
    arrive during the backward pass, layer by layer, and must be all-reduced like real gradients.
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
    """Identity that sleeps in the forward and in the backward pass."""

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
        of_weights = None if ctx.weights is None else torch.zeros_like(ctx.weights)
        return gradients[0], of_weights, None, None
