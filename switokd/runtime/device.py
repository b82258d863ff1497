"""Tensors of the host's onto the device: batches, indices, headers.

Not covered: copying a step ahead (`data/feed.py`); the way back (`distances.to_host`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from switokd.errors import UsageError
from switokd.runtime.allocator import machine_memory
from switokd.runtime.environment import Environment


def to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """`tensor` on `device`. Nothing waits for a GPU, as it would for all that is queued before."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def gpu_count() -> int:
    """GPUs of this machine that PyTorch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_memory(device: torch.device) -> int:
    """Bytes of memory that `device` has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory()


def choose_device(wanted: str, env: Environment) -> torch.device:
    """The rank's device: its own GPU, one shared with other ranks if there are fewer, or the CPU.

    UsageError if CUDA is asked for and there is no GPU.
    """
    gpus = gpu_count()
    if wanted == "cuda" and not gpus:
        raise UsageError("device: cuda, but PyTorch finds no GPU here; use device=cpu")
    if wanted == "cpu" or not gpus:
        return torch.device("cpu")
    return torch.device("cuda", env.local_rank % gpus)
