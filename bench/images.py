"""Images of noise in the shape of CIFAR-100, so that no download is needed.

Each class is noise around a pattern. Only the first `seen` classes occur, so that teachers learn
within ten steps and then pause.

Not covered: accuracies, which mean nothing on these images.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NoiseImages:
    """Training images `[3, side, side]`, uint8, with labels; a tenth as many test images."""

    def __init__(
        self, train: bool, samples: int, classes: int = 100, side: int = 32, seen: int = 10
    ) -> None:
        self.classes = classes
        generator = torch.Generator().manual_seed(int(train))
        count = samples if train else max(samples // 10, 16)
        self.labels = torch.randint(seen, (count,), generator=generator)
        patterns = torch.Generator().manual_seed(2)
        means = torch.randint(64, 192, (classes, 3, 4, 4), generator=patterns).float()
        means = torch.nn.functional.interpolate(means, (side, side), mode="nearest")
        noise = 32 * torch.randn(count, 3, side, side, generator=generator)
        self.images = (means[self.labels] + noise).clamp(0, 255).byte()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])
