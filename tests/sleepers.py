"""Networks for timing: they sleep for a known time, or compute almost nothing."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward * len(x)
        time.sleep(forward * len(x))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grads[0], None, None


class Sleeper(nn.Module):
    """Takes `forward` and `backward` seconds per sample, and hardly any computing."""

    def __init__(
        self, in_channels: int, num_classes: int, forward: float = 1e-3, backward: float = 2e-3
    ) -> None:
        super().__init__()
        self.forward_seconds, self.backward_seconds = forward, backward
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, C]` of images `[B, C, H, W]`."""
        z: Tensor = self.linear(x.mean(dim=(2, 3)))
        slept: Tensor = _Sleep.apply(z, self.forward_seconds, self.backward_seconds)
        return slept


class Flat(nn.Linear):
    """The smallest network for the digits: compiled within a second."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, 10]` of images `[B, 1, 8, 8]`."""
        return super().forward(x.flatten(1))
