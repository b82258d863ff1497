"""MobileNetV2 (Sandler et al., CVPR 2018) of torchvision, with strides by the size of the images.

For images of 64 x 64 and larger this is torchvision's `mobilenet_v2`. For smaller images the
second group has stride 1, so that the last map of a 32 x 32 image is 2 x 2, not one pixel. Only
strides depend on the size: weights of one size fit all others.

Numbers of channels are multiples of 8, as in torchvision; below width 1 they are multiples of 4.
This gives the parameters that Qian et al. (ECCV 2022) print: 0.81M for width 0.5 and 100 classes,
4.7M for width 1.4 and 200 classes.

Their released code differs: its network for CIFAR-100 has 288 more parameters (an expansion in the
first block), ReLU instead of ReLU6, and no dropout (here: `model_kwargs: {dropout: 0}`).

Not covered: pretrained weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

SMALL = 64
"""Pixels of an image's shorter side, below which the second group has stride 1."""


def mobilenet_v2(
    width: float = 1.0,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
    dropout: float = 0.2,
) -> nn.Module:
    """Build MobileNetV2; `width` multiplies all numbers of channels. ValueError if width <= 0.

    image_size: shorter side of the images in pixels. dropout: probability before the last layer.
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
    if in_channels != 3:  # torchvision has no argument for it
        stem: Any = network.get_submodule("features.0")
        stem[0] = nn.Conv2d(in_channels, stem[0].out_channels, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(stem[0].weight, mode="fan_out")
    return network
