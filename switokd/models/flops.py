"""How large a network is: its parameters, and the multiply-adds of one image's forward pass.

Counted are convolutions and matrix products (attention is made of these), of groups only what is
computed; normalisation, activations and pooling are left out, as papers do. The network is made
and run on PyTorch's meta device, which has shapes but no numbers, so that large ones cost nothing;
one that needs numbers is run on the CPU.

Not covered: backward (about twice the forward pass), memory, time; operators of other libraries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from switokd.models.registry import build, check_output, parameter_count

IMAGES = 2
"""What `check_output` sends through."""


@dataclass(frozen=True)
class Size:
    """Of one network."""

    parameters: int
    """Trainable values."""
    multiply_adds: int
    """Of one image's forward pass, in evaluation mode."""


def size_of(
    name: str,
    image: tuple[int, int, int],
    classes: int,
    kwargs: Mapping[str, Any] | None = None,
) -> Size:
    """Size of the network `name` for images of (channels, height, width) and so many classes.

    UsageError if there is none, if it does not take such images, or does not give logits.
    """
    with suppress(
        Exception
    ):  # of networks that need numbers; the CPU finds the user's errors again
        return _size_on("meta", name, image, classes, kwargs)
    return _size_on("cpu", name, image, classes, kwargs)


def _size_on(
    device: str,
    name: str,
    image: tuple[int, int, int],
    classes: int,
    kwargs: Mapping[str, Any] | None,
) -> Size:
    with torch.device(device), torch.random.fork_rng(devices=[]):
        network = build(name, image[0], classes, kwargs, image_size=min(image[1:]))
        with _plain_attention(), FlopCounterMode(display=False) as counter:
            check_output(network, name, image, classes)
    # Counted are floating-point operations, two for each multiply-add.
    return Size(parameter_count(network), counter.get_total_flops() // (2 * IMAGES))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products, which are counted, instead of fused, which on CPUs are not."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
