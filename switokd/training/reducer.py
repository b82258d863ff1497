"""Sums a network's gradients over its ranks while backward is still running.

The gradients of a network with CUDA graphs are ready all at once, so they are summed after
backward.

Each rank's loss is the mean over its shard times the shard's share of the batch. The sum over the
ranks is therefore the gradient of the whole batch's mean, also if shards are uneven or empty.

DistributedDataParallel is not used: it expects one backward pass after every forward pass on every
rank. A paused teacher and a rank with an empty shard have no backward pass.

Not covered: a sum whose order does not depend on the ranks (`micro_batches.py`); sharded weights or
optimizer states; gradient compression.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from switokd.runtime.device import to_device
from switokd.runtime.process_group import collective_errors

BUCKET_BYTES = 8 * 2**20
"""Size of the gradients that one all-reduce carries, at most, unless one parameter is larger."""


@dataclass
class Bucket:
    """Neighbouring parameters of one dtype whose gradients are sent in one collective."""

    parameters: list[nn.Parameter]
    _ready: int = 0
    """Parameters whose gradients are complete on this rank."""
    _has_gradient: list[bool] = field(default_factory=list)
    """By parameter: whether this rank's loss depends on it."""
    _flat: Tensor | None = None
    _work: dist.Work | None = None

    def reset(self) -> None:
        """Forget the last gradients and the last collective."""
        self._ready, self._flat, self._work = 0, None, None

    @property
    def is_ready(self) -> bool:
        """Whether all gradients are complete on this rank."""
        return self._ready == len(self.parameters)

    def mark_ready(self, parameters: int) -> None:
        """Count `parameters` more complete gradients."""
        self._ready += parameters

    def mark_all_ready(self) -> None:
        """Treat all gradients as complete: backward is over, or this rank has no loss."""
        self._ready = len(self.parameters)

    def send(self, group: dist.ProcessGroup | None, transport: torch.device | None) -> None:
        """Start to sum the gradients over `group`, on the device `transport`; does not wait."""
        flat = self.pack()
        self._flat = flat if transport is None else flat.to(transport)
        self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def receive(self) -> None:
        """Wait for the sum and set each parameter's gradient."""
        assert self._work is not None
        assert self._flat is not None
        self._work.wait()
        self.unpack(self._flat)

    def pack(self) -> Tensor:
        """Return all gradients and one flag per parameter as one flat tensor.

        A flag is 1 if this rank's loss depends on the parameter, else 0; then its gradient is
        zeros. The parameters' own `grad` is freed.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self._has_gradient = [p.grad is not None for p in self.parameters]
        if all(self._has_gradient):
            flags = gradients[0].new_ones(len(gradients))
        else:
            on_host = torch.tensor(self._has_gradient, dtype=gradients[0].dtype)
            flags = to_device(gradients[0].device, on_host)
        pairs = zip(gradients, self._strides, strict=True)
        flat = torch.cat([*(_in_memory_order(g, strides) for g, strides in pairs), flags])
        for parameter in self.parameters:  # the rest of backward may use this memory
            parameter.grad = None
        return flat

    def unpack(self, flat: Tensor) -> None:
        """Set each parameter's gradient to a view of the sum, or to None if no loss depends on it.

        The summed flags are read, which waits for a GPU, only if this rank's loss does not depend
        on all parameters.
        """
        has_gradient: list[bool] | list[float] = self._has_gradient
        if not all(has_gradient):
            has_gradient = flat[-len(self.parameters) :].tolist()
        sizes = [p.numel() for p in self.parameters]
        *parts, _ = torch.split(flat.to(self.parameters[0].device), [*sizes, len(sizes)])
        for i, (parameter, part) in enumerate(zip(self.parameters, parts, strict=True)):
            if has_gradient[i]:
                parameter.grad = part.as_strided(parameter.shape, self._strides[i])

    @cached_property
    def _strides(self) -> list[tuple[int, ...]]:
        """The parameters' strides; those of a dense copy where a parameter has gaps."""
        return [torch.empty_like(p, device="meta").stride() for p in self.parameters]


def _in_memory_order(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a gradient's values `[numel]` in the memory order of its parameter.

    Usually the gradient has this order already, and nothing is copied.
    """
    if gradient.stride() != strides:
        gradient = gradient.new_empty_strided(gradient.shape, strides).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))


class GradientReducer:
    """Sums one network's gradients over its ranks.

    parameters: the network's trained parameters. group: the network's ranks; None: this rank alone,
    and there is nothing to sum. transport: device that the collective needs its tensors on; None:
    the parameters' device.
    """

    def __init__(
        self,
        name: str,
        parameters: list[nn.Parameter],
        group: dist.ProcessGroup | None = None,
        transport: torch.device | None = None,
    ) -> None:
        self.parameters, self.group = parameters, group
        self._doing = f"adding up the gradients of {name}"
        self._transport = transport
        self._syncs = True
        self._buckets: list[Bucket] = []
        self._sent = 0
        """Buckets sent in this backward pass."""
        if group is not None:
            # Backward reaches the last layers first, so their bucket is sent first.
            self._buckets = list(buckets(reversed(parameters)))
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Drop the gradients of the last optimizer step."""
        for parameter in self.parameters:
            parameter.grad = None
        for bucket in self._buckets:
            bucket.reset()
        self._sent = 0

    def begin(self) -> None:
        """Prepare for a backward pass."""

    def part_done(self) -> None:
        """Note that backward has computed the gradients of one micro-batch; here the only one."""

    def set_sync(self, is_enabled: bool) -> None:
        """Send gradients during the next backward passes, or accumulate them on this rank."""
        self._syncs = is_enabled

    def complete(self) -> None:
        """Send the remaining buckets: backward is over, or this rank's shard is empty."""
        if not self._syncs:
            return
        for bucket in self._buckets:
            bucket.mark_all_ready()
        self._send_ready()

    def finish(self) -> None:
        """Wait until all gradients are sums over the network's ranks.

        CollectiveError if another rank of the network is gone.
        """
        with collective_errors(self._doing):
            for bucket in self._buckets:
                bucket.receive()

    def _hook(self, bucket: Bucket):  # type: ignore[no-untyped-def]
        def on_gradient(parameter: Tensor) -> None:
            if self._syncs:
                bucket.mark_ready(1)
                self._send_ready()

        return on_gradient

    def _send_ready(self) -> None:
        """Send the buckets that are ready, in the same order on every rank."""
        while self._sent < len(self._buckets):
            bucket = self._buckets[self._sent]
            if not bucket.is_ready:
                return
            with collective_errors(self._doing):
                bucket.send(self.group, self._transport)
            self._sent += 1


def buckets(parameters: Iterable[nn.Parameter]) -> Iterable[Bucket]:
    """Divide parameters, in order, into buckets of one dtype and about `BUCKET_BYTES`."""
    bucket, size = Bucket([]), 0
    for parameter in parameters:
        is_full = size + parameter.nbytes > BUCKET_BYTES
        if bucket.parameters and (is_full or parameter.dtype != bucket.parameters[0].dtype):
            yield bucket
            bucket, size = Bucket([]), 0
        bucket.parameters.append(parameter)
        size += parameter.nbytes
    yield bucket
