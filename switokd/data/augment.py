"""Random numbers and augmentation as functions of (seed, epoch, sample index).

The functions have no state. So a network gets the same pixels with any number of loader processes
and ranks, and after a restart.

Not covered: mixup and cutmix (`mixup.py`); transforms of a user's own data set, which `seeding`
only seeds; generators that a user's code makes itself (`numpy.random.default_rng()`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switokd.runtime.device import to_device

Keys = NDArray[np.uint64]
"""One 64-bit hash per sample, from which all its random numbers are drawn."""


def mix(*parts: NDArray[np.int64] | int) -> Keys:
    """Hash integers, or arrays of integers element by element, to 64 bits.

    One step of SplitMix64 per part (Steele et al., OOPSLA 2014).
    """
    h = np.uint64(0)
    for part in parts:
        with np.errstate(over="ignore"):
            h = (h ^ np.asarray(part, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return np.asarray(h)


def mix_one(*parts: int) -> int:
    """Hash single integers as `mix` does, fifteen times faster than numpy's calls."""
    mask, h = 2**64 - 1, 0
    for part in parts:
        h = (h ^ (part & mask)) + 0x9E3779B97F4A7C15 & mask
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & mask
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & mask
        h ^= h >> 31
    return h


def order(seed: int, epoch: int, samples: int) -> list[int]:
    """Return a random permutation of `samples` indices for one epoch."""
    generator = torch.Generator().manual_seed(mix_one(seed, epoch) % 2**63)
    return torch.randperm(samples, generator=generator).tolist()


def seed_torch(key: int, device: torch.device) -> None:
    """Seed PyTorch's default generators of the CPU and of `device`, without waiting for a GPU."""
    torch.default_generator.manual_seed(key % 2**63)
    if device.type == "cuda":  # cheaper than torch.manual_seed, which seeds all devices
        torch.cuda.default_generators[device.index].manual_seed(key % 2**63)


def seed_generators(key: int, device: torch.device) -> None:
    """Seed the default generators of Python, numpy and PyTorch, before code of a user draws.

    Takes some 10 microseconds, and does not wait for a GPU.
    """
    random.seed(key)
    np.random.seed(key % 2**32)
    seed_torch(key, device)


@contextmanager
def seeding() -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds the default generators of Python, numpy and PyTorch on the CPU.

    For random transforms of a user's data set. The generators' states are restored at the end.
    Saving and restoring takes longer than decoding a small image, so enter it once per batch.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    generator = torch.default_generator
    torch_state = generator.get_state()

    def seed(key: int) -> None:
        random.seed(key)
        np.random.seed(key % 2**32)
        generator.manual_seed(key % 2**63)

    try:
        yield seed
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        generator.set_state(torch_state)


def crop_and_flip(x: Tensor, keys: Keys, padding: int, flip: bool) -> Tensor:
    """Shift every image by up to `padding` pixels, fill with zeros, and mirror half of the images.

    x: images `[B, C, H, W]`. keys: `[B]`; an image's shift and mirroring depend on its key alone.
    flip: whether to mirror.
    """
    if not padding:
        if flip:  # cheaper than the general indexing below
            mirrored = to_device(x.device, draw(keys, 3, 2).bool())
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x.contiguous()
    _, _, height, width = x.shape
    x = torch.nn.functional.pad(x, (padding,) * 4)
    rows = draw(keys, 1, 2 * padding + 1)[:, None] + torch.arange(height)  # [B, H]
    columns = draw(keys, 2, 2 * padding + 1)[:, None] + torch.arange(width)  # [B, W]
    if flip:
        columns = torch.where(draw(keys, 3, 2).bool()[:, None], columns.flip(1), columns)
    both = to_device(x.device, torch.cat([rows, columns], dim=1))
    rows, columns = both[:, :height], both[:, height:]
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    # Advanced indexing of [B, H, W, C] with [B, 1, 1], [B, H, 1], [B, 1, W] keeps channels last.
    x = x.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return x.contiguous()


def draw(keys: Keys, stream: int, high: int) -> Tensor:
    """Draw one integer in [0, high) per key.

    stream: number of the draw; draws of different streams are independent.
    """
    draws = mix(keys.astype(np.int64), stream) % np.uint64(high)
    return torch.from_numpy(draws.astype(np.int64))
