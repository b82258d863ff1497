"""Batches onto the rank's device, in the memory order that its networks compute in.

On a GPU the next batch is copied while this one is worked on: from pinned memory, on a stream of
its own, so that the step never waits for the host.

Not covered: making the batches (`loader.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from switokd.data.loader import Batch
from switokd.runtime.device import to_device


def prefetch(
    batches: Iterator[Batch], device: torch.device, channels_last: bool, ahead: bool = True
) -> Iterator[Batch]:
    """The same batches, on `device`. ahead: where that is a GPU, each is there one step early."""
    if ahead and device.type == "cuda":
        return _ahead(batches, device, channels_last)
    return (_place(batch, device, channels_last) for batch in batches)


def _place(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    x, y = (to_device(device, t) for t in batch)
    return in_order(x, channels_last), y


def in_order(x: Tensor, channels_last: bool) -> Tensor:
    """Images `[B, C, H, W]` in one of two memory orders, and with the strides that go with it.

    Of one channel, or one row, several strides mean the same; compiled networks tell them apart.
    """
    if x.dim() != 4:
        return x
    _, c, h, w = x.shape
    order = torch.channels_last if channels_last else torch.contiguous_format
    strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return x.contiguous(memory_format=order).as_strided(x.shape, strides)


def _ahead(batches: Iterator[Batch], device: torch.device, channels_last: bool) -> Iterator[Batch]:
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: Batch | None = None
    while True:
        # Also what is held on the GPU is cropped and mirrored on the side stream: its small
        # transfers would wait for all of the step on the step's own.
        with torch.cuda.stream(copying):
            batch = next(batches, None)
            if batch is not None:
                batch = _place(batch, device, channels_last)
        if ready is not None:
            yield ready
        if batch is None:
            return
        computing.wait_stream(copying)
        for tensor in batch:  # its memory must not be given away while the step reads it
            tensor.record_stream(computing)
        ready = batch
