"""Chooses the device of a rank, and copies tensors to it.

Not covered: copying a batch ahead (`data/prefetch.py`); copying to the host
(`distillation/distances.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from switokd.errors import UsageError
from switokd.runtime.allocator import machine_memory
from switokd.runtime.environment import Environment


def to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy `tensor` to `device`; a copy to a GPU does not wait for the queued work."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def gpu_count() -> int:
    """Return the number of GPUs of this machine that PyTorch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_memory(device: torch.device) -> int:
    """Return the memory of `device` in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory()


def choose_device(wanted: str, env: Environment) -> torch.device:
    """Return the device of a rank: a GPU, shared if there are fewer GPUs than ranks, or the CPU.

    wanted: "cuda", "cpu" or "auto". UsageError for "cuda" on a machine without a GPU.
    """
    gpus = gpu_count()
    if wanted == "cuda" and not gpus:
        raise UsageError("device: cuda, but PyTorch finds no GPU here; use device=cpu")
    if wanted == "cpu" or not gpus:
        return torch.device("cpu")
    return torch.device("cuda", env.local_rank % gpus)
