"""Counts a network's parameters, and the multiply-adds of a forward pass of one image.

Convolutions and matrix products count, also those inside attention. A grouped convolution counts
only its own products. As in papers, normalisation, activations and pooling do not count.

The network is built and run on PyTorch's meta device, which has shapes but no values, so that
large networks cost nothing. A network that reads values is run on the CPU instead.

Not covered: the backward pass (about twice the forward pass), memory and time; operators of other
libraries.
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
"""Number of images that `check_output` sends through the network."""


@dataclass(frozen=True)
class Size:
    """Parameters and arithmetic of one network."""

    parameters: int
    """Number of trainable values."""
    multiply_adds: int
    """In a forward pass of one image, in evaluation mode."""


def size_of(
    name: str,
    image: tuple[int, int, int],
    classes: int,
    kwargs: Mapping[str, Any] | None = None,
) -> Size:
    """Return the size of the network `name`.

    image: channels, height and width. kwargs: arguments for the model's callable. UsageError if
    there is no such network, it does not take these images, or it does not return logits.
    """
    # A network that reads values fails on the meta device. Other errors come again on the CPU.
    with suppress(Exception):
        return _size_on("meta", name, image, classes, kwargs)
    return _size_on("cpu", name, image, classes, kwargs)


def _size_on(
    device: str,
    name: str,
    image: tuple[int, int, int],
    classes: int,
    kwargs: Mapping[str, Any] | None,
) -> Size:
    """Return the size as counted on one device."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        network = build(name, image[0], classes, kwargs, image_size=min(image[1:]))
        with _plain_attention(), FlopCounterMode(display=False) as counter:
            check_output(network, name, image, classes)
    # PyTorch counts floating-point operations, two per multiply-add.
    return Size(parameter_count(network), counter.get_total_flops() // (2 * IMAGES))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Compute attention as matrix products, because fused attention is not counted on CPUs."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
