"""Tensors of the host's onto the device: batches, indices, headers.

Not covered: copying a step ahead (`data/feed.py`); the way back (`distances.to_host`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """`tensor` on `device`. Nothing waits for a GPU, as it would for all that is queued before."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
