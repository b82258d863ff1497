"""Gradients of a network on several ranks: added up over its ranks while backward still runs.

Each rank's loss is its shard's mean times its share of the batch, so that the sum over the ranks
is the gradient of the whole batch's mean, also where shards are uneven or empty.

DistributedDataParallel is not used: it must see a backward pass after every forward pass on
every rank, which neither a paused teacher nor a rank with an empty shard has.

Not covered: sharded weights or optimizer state; compressing gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from switokd.timings import BUCKET_BYTES
from switokd.world import naming


@dataclass
class Bucket:
    """Some neighbouring parameters whose gradients travel together."""

    parameters: list[nn.Parameter]
    ready: int = 0
    flat: Tensor | None = None
    work: dist.Work | None = None

    def pack(self) -> Tensor:
        """All gradients in one tensor, zeros for a parameter that this rank's loss did not reach;
        behind them a 1 for each parameter that it did, else a 0.
        """
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        has = [p.grad is not None for p in self.parameters]
        marks = grads[0].new_ones(len(has)) if all(has) else grads[0].new_tensor(has)
        return torch.cat([*(g.reshape(-1) for g in grads), marks])

    def unpack(self, flat: Tensor, reached: set[nn.Parameter]) -> None:
        """Give each parameter its part of the sum; one that no rank's loss reaches keeps none.

        reached: those that are known to be; is added to, and the marks are read only for others.
        """
        sizes = [p.numel() for p in self.parameters]
        *parts, marks = torch.split(flat, [*sizes, len(sizes)])
        if not reached.issuperset(self.parameters):
            counts = zip(self.parameters, marks.tolist(), strict=True)
            reached.update(p for p, count in counts if count)
        for parameter, part in zip(self.parameters, parts, strict=True):
            if parameter not in reached:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(part.view(parameter.shape))


@dataclass
class Gradients:
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
    _reached: set[nn.Parameter] = field(default_factory=set)
    """Parameters that a loss has reached, on any rank: where this one's shard was empty as well."""

    def __post_init__(self) -> None:
        if self.group is None:
            return
        # Backward reaches the last layers first: their bucket leaves first.
        self._buckets = list(_buckets(reversed(self.parameters)))
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
        with naming(f"adding up the gradients of {self.name}"):
            for bucket in self._buckets:
                assert bucket.work is not None
                assert bucket.flat is not None
                bucket.work.wait()
                bucket.unpack(bucket.flat, self._reached)

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
            with naming(f"adding up the gradients of {self.name}"):
                bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)
            self._next += 1


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterable[Bucket]:
    bucket, size = Bucket([]), 0
    for parameter in parameters:
        if bucket.parameters and size + parameter.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = Bucket([]), 0
        bucket.parameters.append(parameter)
        size += parameter.nbytes
    yield bucket
