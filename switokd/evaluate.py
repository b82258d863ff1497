"""Top-1 accuracy of one network on a test set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.inference_mode()
def top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Share of the images, 0 to 1, whose largest logit is the label's; keeps the model's mode."""
    was_training = model.training
    model.eval()
    correct, samples = torch.zeros((), dtype=torch.long, device=device), 0
    for x, y in batches:
        z = model(x.to(device))
        correct += (z.argmax(dim=1) == y.to(device)).sum()
        samples += len(y)
    model.train(was_training)
    return correct.item() / samples
