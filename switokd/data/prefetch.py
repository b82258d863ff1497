"""Copies batches to the rank's device, in the memory order that its networks compute in.

For a GPU, the next batch is copied during the current step, from pinned memory and on a stream of
its own. So the step never waits for the host.

Not covered: making the batches (`loader.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from switokd.data.loader import Batch
from switokd.runtime.device import to_device
from switokd.runtime.waiting import waiting_for_first


def prefetch(
    batches: Iterator[Batch], device: torch.device, channels_last: bool, ahead: bool = True
) -> Iterator[Batch]:
    """Yield the batches on `device`; say so if the first one takes long.

    channels_last: whether images get NHWC order. ahead: on a GPU, copy a batch one step early.
    """
    batches = waiting_for_first(batches, "the first batch of images")
    if ahead and device.type == "cuda":
        return _ahead(batches, device, channels_last)
    return (_place(batch, device, channels_last) for batch in batches)


def _place(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    """Copy one batch to the device, out of the memory that it shares with a loader process.

    Networks get lazy copies of the images (`training/input_guard.py`), which shared memory cannot
    be: it would be copied for each network.
    """
    x, y = (to_device(device, t) for t in batch)
    is_shared = x.device.type == "cpu" and x.untyped_storage().is_shared()
    x = x.clone() if is_shared else x
    return in_order(x, channels_last), y


def in_order(x: Tensor, channels_last: bool) -> Tensor:
    """Return images `[B, C, H, W]` in NHWC or NCHW memory order, with that order's usual strides.

    With one channel or one row, several strides describe the same memory. Compiled networks
    would compile again for other strides.
    """
    if x.dim() != 4:
        return x
    _, c, h, w = x.shape
    order = torch.channels_last if channels_last else torch.contiguous_format
    strides = (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return x.contiguous(memory_format=order).as_strided(x.shape, strides)


def _ahead(batches: Iterator[Batch], device: torch.device, channels_last: bool) -> Iterator[Batch]:
    """Yield a batch after the next one's copy has been started on a stream of its own."""
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: Batch | None = None
    while True:
        # Images in GPU memory are cropped and mirrored on this stream, too: on the step's stream,
        # their small copies would wait for the whole step.
        with torch.cuda.stream(copying):
            batch = next(batches, None)
            if batch is not None:
                batch = _place(batch, device, channels_last)
        if ready is not None:
            yield ready
        if batch is None:
            return
        computing.wait_stream(copying)
        for tensor in batch:  # keep the memory until the step has read it
            tensor.record_stream(computing)
        ready = batch
