"""Random numbers and augmentation as functions of (seed, epoch, sample index).

Nothing here has a state, so neither the number of loader processes nor of ranks, nor a restart,
changes what a network sees.
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


def mix(*parts: NDArray[np.int64] | int) -> Keys:
    """Hash integers (or arrays of them, elementwise) to 64 well-mixed bits: SplitMix64 steps."""
    h = np.uint64(0)
    for part in parts:
        with np.errstate(over="ignore"):
            h = (h ^ np.asarray(part, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return np.asarray(h)


def mix_one(*parts: int) -> int:
    """The same of single integers, for which numpy's calls take fifteen times as long."""
    most, h = 2**64 - 1, 0
    for part in parts:
        h = (h ^ (part & most)) + 0x9E3779B97F4A7C15 & most
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & most
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & most
        h ^= h >> 31
    return h


def order(seed: int, epoch: int, samples: int) -> list[int]:
    """The epoch's order of the samples."""
    generator = torch.Generator().manual_seed(mix_one(seed, epoch) % 2**63)
    return torch.randperm(samples, generator=generator).tolist()


def seed_torch(key: int, device: torch.device) -> None:
    """Seed PyTorch's usual generators, the CPU's and the one of `device`; nothing waits for it."""
    torch.default_generator.manual_seed(key % 2**63)
    if device.type == "cuda":  # torch.manual_seed would prepare one for later, at some cost
        torch.cuda.default_generators[device.index].manual_seed(key % 2**63)


@contextmanager
def seeding() -> Iterator[Callable[[int], None]]:
    """Run a user's random transforms under keys, whichever usual generator they draw from.

    Gives a function that seeds all of them; their states are put back at the end. Saving and
    putting back costs more than a small image's decoding, so do it once a batch.
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
    """Shift each image by up to `padding` pixels (zeros move in) and mirror every second one.

    x: `[B, C, H, W]`, keys: `[B]`. The same key always gives the same picture.
    """
    if not padding:
        if flip:  # no pixel moves but those of every second image
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
    # Indexing with [B, 1, 1], [B, H, 1], [B, 1, W] puts the channels last.
    x = x.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return x.contiguous()


def draw(keys: Keys, stream: int, high: int) -> Tensor:
    """One integer in [0, high) per key; streams are independent of each other."""
    draws = mix(keys.astype(np.int64), stream) % np.uint64(high)
    return torch.from_numpy(draws.astype(np.int64))
