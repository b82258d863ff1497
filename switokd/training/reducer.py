"""Gradients of a network on several ranks: added up over its ranks while backward still runs.

Those of a recorded network come all at once, and are added up after it.

Each rank's loss is its shard's mean times its share of the batch, so that the sum over the ranks
is the gradient of the whole batch's mean, also where shards are uneven or empty.

DistributedDataParallel is not used: it must see a backward pass after every forward pass on
every rank, which neither a paused teacher nor a rank with an empty shard has.

Not covered: sharded weights or optimizer state; compressing gradients.
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
    """Some neighbouring parameters, of one type, whose gradients travel together."""

    parameters: list[nn.Parameter]
    ready: int = 0
    reached: list[bool] = field(default_factory=list)
    """By parameter, whether this rank's loss has reached it."""
    flat: Tensor | None = None
    work: dist.Work | None = None

    def pack(self) -> Tensor:
        """All gradients in one tensor, zeros for a parameter that this rank's loss did not reach;
        behind them a 1 for each parameter that it did, else a 0.
        """
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.reached = [p.grad is not None for p in self.parameters]
        if all(self.reached):
            marks = grads[0].new_ones(len(grads))
        else:
            marks = to_device(grads[0].device, torch.tensor(self.reached, dtype=grads[0].dtype))
        values = [_as_it_lies(g, strides) for g, strides in zip(grads, self._strides, strict=True)]
        flat = torch.cat([*values, marks])
        for parameter in self.parameters:  # their memory serves the rest of backward
            parameter.grad = None
        return flat

    def unpack(self, flat: Tensor) -> None:
        """Give each parameter its part of the sum; one that no rank's loss reached has none.

        The marks are read, which waits for a GPU, only where this rank's loss left some out.
        """
        reached = self.reached if all(self.reached) else flat[-len(self.parameters) :].tolist()
        sizes = [p.numel() for p in self.parameters]
        *parts, _ = torch.split(flat.to(self.parameters[0].device), [*sizes, len(sizes)])
        for i, (parameter, part) in enumerate(zip(self.parameters, parts, strict=True)):
            if reached[i]:  # a view of the sum: nothing is copied
                parameter.grad = part.as_strided(parameter.shape, self._strides[i])

    @cached_property
    def _strides(self) -> list[tuple[int, ...]]:
        """The parameters' own strides, made dense where they are not."""
        return [torch.empty_like(p, device="meta").stride() for p in self.parameters]


def _as_it_lies(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Give a gradient's values `[numel]` in the memory order of its parameter.

    That is its own order as a rule, and then nothing is permuted.
    """
    if gradient.stride() != strides:
        gradient = gradient.new_empty_strided(gradient.shape, strides).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))


@dataclass
class GradientReducer:
    """One network's gradients, on this rank. `group` None: it has no other rank, nothing to do."""

    name: str
    parameters: list[nn.Parameter]
    group: dist.ProcessGroup | None = None
    transport: torch.device | None = None
    """Where a collective needs its tensors; None: where they are."""
    holds: bool = False
    """Whether they stay on this rank for now: more are added to them before they are sent."""
    _buckets: list[Bucket] = field(default_factory=list)
    _next: int = 0

    def __post_init__(self) -> None:
        if self.group is None:
            return
        # Backward reaches the last layers first: their bucket leaves first.
        self._buckets = list(buckets(reversed(self.parameters)))
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Forget the previous step's gradients."""
        for parameter in self.parameters:
            parameter.grad = None
        for bucket in self._buckets:
            bucket.ready, bucket.flat, bucket.work = 0, None, None
        self._next = 0

    def complete(self) -> None:
        """Send what is left: this rank's backward is over, or its shard is empty."""
        if self.holds:
            return
        for bucket in self._buckets:
            bucket.ready = len(bucket.parameters)
        self._launch()

    def finish(self) -> None:
        """Wait until all gradients are the sum over the network's ranks.

        CollectiveError if another of its ranks is gone.
        """
        with collective_errors(f"adding up the gradients of {self.name}"):
            for bucket in self._buckets:
                assert bucket.work is not None
                assert bucket.flat is not None
                bucket.work.wait()
                bucket.unpack(bucket.flat)

    def _hook(self, bucket: Bucket):  # type: ignore[no-untyped-def]
        def ready(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            if not self.holds:
                bucket.ready += 1
                self._launch()

        return ready

    def _launch(self) -> None:
        """Send every bucket that is ready, in the same order on every rank."""
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.ready < len(bucket.parameters):
                return
            bucket.flat = bucket.pack()
            if self.transport is not None:
                bucket.flat = bucket.flat.to(self.transport)
            with collective_errors(f"adding up the gradients of {self.name}"):
                bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)
            self._next += 1


def buckets(parameters: Iterable[nn.Parameter]) -> Iterable[Bucket]:
    """Divide parameters, in their order, into buckets of `BUCKET_BYTES`, each of one type."""
    bucket, size = Bucket([]), 0
    for parameter in parameters:
        is_full = size + parameter.nbytes > BUCKET_BYTES
        if bucket.parameters and (is_full or parameter.dtype != bucket.parameters[0].dtype):
            yield bucket
            bucket, size = Bucket([]), 0
        bucket.parameters.append(parameter)
        size += parameter.nbytes
    yield bucket
