"""Top-1 of one network on a test set, or on this rank's part of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from switokd.training.learner import Learner


@torch.inference_mode()
def top1(
    learner: Learner,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    model: nn.Module | None = None,
) -> tuple[int, int]:
    """Images whose largest logit is the label's, and all images; keeps the model's mode.

    model: another than the learner's live one, such as its moving average.
    """
    model = model or learner.model
    was_training = model.training
    model.eval()
    correct, samples = torch.zeros((), dtype=torch.long, device=device), 0
    for x, y in batches:
        z = learner.predict(x.to(device), model)
        correct += (z.argmax(dim=1) == y.to(device)).sum()
        samples += len(y)
    model.train(was_training)
    return int(correct.item()), samples
