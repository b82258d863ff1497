"""MobileNetV2 (Sandler et al., CVPR 2018), torchvision's, with strides by the size of the images.

For images of 64 x 64 and more it is torchvision's `mobilenet_v2`. Below that the second group
keeps its input's size, so that an image of 32 x 32 ends as a map of 2 x 2, not of one pixel. Only
strides depend on the size: weights of one size fit the others.

Channels are multiples of 8 as in torchvision, below width 1 of 4. That gives the sizes which
Qian et al. (ECCV 2022) print: 0.81M of width 0.5 and 100 classes, 4.7M of width 1.4 and 200.

Where their released code differs: its network for CIFAR-100 has 288 values more (an expansion in
the first block), ReLU instead of ReLU6, and no dropout (`model_kwargs: {dropout: 0}` here).
"""

from __future__ import annotations

from typing import Any

from torch import nn

SMALL = 64
"""Pixels of the image's shorter side; below, the second group has stride 1."""


def mobilenet_v2(
    width: float = 1.0,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
    dropout: float = 0.2,
) -> nn.Module:
    """MobileNetV2; `width` multiplies numbers of channels. ValueError if width <= 0.

    image_size: shorter side of the images that it will see, in pixels.
    """
    from torchvision.models import MobileNetV2

    if width <= 0:
        raise ValueError(f"width must be above 0, got {width}")
    groups = [  # expansion, output channels (before the width factor), blocks, stride
        [1, 16, 1, 1],
        [6, 24, 2, 1 if image_size < SMALL else 2],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    network: nn.Module = MobileNetV2(
        num_classes, width, groups, round_nearest=8 if width >= 1 else 4, dropout=dropout
    )
    if in_channels != 3:  # torchvision's takes no such argument
        stem: Any = network.get_submodule("features.0")
        stem[0] = nn.Conv2d(in_channels, stem[0].out_channels, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(stem[0].weight, mode="fan_out")
    return network
