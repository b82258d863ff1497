"""Residual networks (He et al., CVPR 2016) for small images.

    depth 20, 32, 44, 56, 110    the paper's networks for CIFAR: 16, 32 and 64 channels, shortcuts
                                 without weights
    depth 18, 34                 the paper's networks for ImageNet, from torchvision, with first
                                 layers that keep the image's size: a 3x3 convolution of stride 1,
                                 no max pooling

Not covered: images of 224 x 224, for which torchvision has resnet18, resnet34, ...; depths with
bottleneck blocks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from switokd.models.families import RESNET_DEPTHS

IMAGENET_BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}
"""By depth: number of blocks of two convolutions in the four groups."""


def resnet(depth: int, in_channels: int = 3, num_classes: int = 10) -> nn.Module:
    """Build ResNet-`depth` for small images. ValueError for an unsupported depth."""
    if depth not in RESNET_DEPTHS:
        known = ", ".join(str(d) for d in RESNET_DEPTHS)
        raise ValueError(f"depth must be one of {known}, got {depth}")
    if depth not in IMAGENET_BLOCKS:
        return CifarResNet(depth, in_channels, num_classes)
    from torchvision.models.resnet import BasicBlock, ResNet

    network: nn.Module = ResNet(BasicBlock, IMAGENET_BLOCKS[depth], num_classes)
    network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, with a shortcut without weights.

    If the shape changes, the shortcut takes every stride-th pixel and adds channels of zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more_channels = stride, out_channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in, H, W]` to `[B, out, H/stride, W/stride]`."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.more_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.more_channels))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """ResNet of depth 6 n + 2 for CIFAR: three groups of n blocks with 16, 32 and 64 channels.

    ValueError if depth is not 6 n + 2 with n >= 1.
    """

    def __init__(self, depth: int, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 8, 14, 20, ..., got {depth}")
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        layers = [BasicBlock(16, 16, stride=1) for _ in range(blocks)]
        for channels in (32, 64):
            layers.append(BasicBlock(channels // 2, channels, stride=2))
            layers.extend(BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1))
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, in_channels, H, W]` to logits `[B, num_classes]`."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]
