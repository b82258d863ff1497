"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016) for small images.

Not covered: dropout inside the blocks.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            None
            if in_channels == out_channels and stride == 1
            else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        activated = F.relu(self.bn1(x))
        # A shortcut with weights takes the activated input, an identity takes the input itself.
        residual = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + out  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """WRN-`depth`-`width`: three groups of (depth - 4) / 6 blocks.

    The groups have 16, 32 and 64 channels, times `width`.

    ValueError if depth is not 6 n + 4 with n >= 1, or width is below 1.
    """

    def __init__(self, depth: int, width: int, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1 or width < 1:
            raise ValueError(
                f"depth must be 10, 16, 22, 28, ... and width 1 or more, got {depth}-{width}"
            )
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for group, (c_in, c_out) in enumerate(pairwise(channels)):
            layers.append(PreActivationBlock(c_in, c_out, stride=1 if group == 0 else 2))
            layers.extend(PreActivationBlock(c_out, c_out, stride=1) for _ in range(blocks - 1))
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, in_channels, H, W]` to logits `[B, num_classes]`."""
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]
