"""MobileNet v1 (Howard et al., arXiv:1704.04861) with the usual strides for small images.

Not covered: the strides of the original network for images of 224 x 224.
"""

from __future__ import annotations

from torch import Tensor, nn

# Output channels (before the width factor) and stride of the 13 depthwise-separable blocks.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


def _convolution(c_in: int, c_out: int, size: int, stride: int, groups: int = 1) -> nn.Sequential:
    """Convolution with `size` x `size` kernels, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


class MobileNet(nn.Module):
    """MobileNet v1; `width` multiplies all numbers of channels. ValueError if width <= 0."""

    def __init__(self, width: float = 1.0, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width must be above 0, got {width}")
        channels = max(int(32 * width), 1)
        layers = [_convolution(in_channels, channels, 3, stride=1)]
        for base, stride in BLOCKS:
            c_out = max(int(base * width), 1)
            layers.append(_convolution(channels, channels, 3, stride, groups=channels))
            layers.append(_convolution(channels, c_out, 1, stride=1))
            channels = c_out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, in_channels, H, W]` to logits `[B, num_classes]`."""
        return self.head(self.features(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]
