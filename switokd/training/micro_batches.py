"""A network's batch in micro-batches: the same bits on any number of ranks.

Floating-point sums depend on their order. With `compute.micro_batches: K`, every batch is therefore
computed in K parts, whatever the number of ranks. Sums over the batch do not depend on the ranks:

    gradients          in a binary tree over the micro-batches (`TreeReducer`)
    BatchNorm          each micro-batch has its own statistics; the running statistics move by the
                       mean of the micro-batches' changes, again in a tree (`MeanBuffers`)
    distances, losses  rounded to a grid, on which sums are exact (`distances.on_grid`)

K and the number of ranks are powers of two, so a rank's own micro-batches are one subtree.

Not covered: complex buffers that change, and state that a module keeps outside of its buffers: a
rank's micro-batches change them one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from switokd.runtime.process_group import collective_errors
from switokd.training.exchange import all_gather
from switokd.training.reducer import GradientReducer, buckets

ALIGNMENT = 64
"""Bytes. PyTorch aligns new tensors to them, and some kernels add in another order where they
cannot rely on it."""


def aligned(x: Tensor) -> Tensor:
    """Return `x`, or a copy if its memory does not begin like that of a new tensor."""
    # x.data_ptr() would copy the memory of a lazy copy (`input_guard.py`).
    return x.clone() if x.storage_offset() * x.element_size() % ALIGNMENT else x


def split(x: Tensor, parts: Sequence[slice]) -> list[Tensor]:
    """Return `x`, a rank's part of a batch, by micro-batch; parts: their slices of the batch."""
    start = parts[0].start
    return [aligned(x[part.start - start : part.stop - start]) for part in parts]


class Tree:
    """Adds up lists of tensors in pairs: ((0 + 1) + (2 + 3)) + ..., whoever adds which part."""

    def __init__(self) -> None:
        self.count = 0
        """Number of lists that were added."""
        self._sums: list[tuple[int, Sequence[Tensor]]] = []
        """Sums of neighbouring lists, with their level in the tree; levels fall from left to
        right."""

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add the next list; its tensors may be overwritten."""
        self.count, level = self.count + 1, 0
        while self._sums and self._sums[-1][0] == level:
            _, left = self._sums.pop()
            tensors = [a.add_(b) for a, b in zip(left, tensors, strict=True)]
            level += 1
        self._sums.append((level, tensors))

    @property
    def total(self) -> Sequence[Tensor]:
        """The sum; the number of lists must be a power of two."""
        ((_, total),) = self._sums
        return total


class RankSum:
    """Adds tensors over the ranks of a network, in the order of a tree.

    doing: names the operation in an error. group: the network's ranks; None: this rank alone.
    transport: device that the collective needs its tensors on; None: the tensors' device.
    """

    def __init__(
        self, doing: str, group: dist.ProcessGroup | None, transport: torch.device | None
    ) -> None:
        self._doing, self._group, self._transport = doing, group, transport

    def __call__(self, flat: Tensor) -> Tensor:
        """Return the sum of all ranks' `flat`, the same on all of them.

        CollectiveError if another rank of the network is gone.
        """
        if self._group is None:
            return flat
        sent = flat if self._transport is None else flat.to(self._transport)
        rows = sent.new_empty(self._group.size() * len(sent))
        with collective_errors(self._doing):
            all_gather(rows, sent, group=self._group)
        tree = Tree()
        for row in rows.view(-1, len(sent)).to(flat.device):
            tree.add([row])
        return tree.total[0]


class TreeReducer(GradientReducer):
    """Adds up a network's gradients over all micro-batches, after each backward pass.

    Gradients of earlier steps of an accumulation window are kept, and are equal on all ranks.

    parts: number of this rank's micro-batches. The other arguments are as in GradientReducer.
    """

    def __init__(
        self,
        name: str,
        parameters: list[nn.Parameter],
        parts: int,
        group: dist.ProcessGroup | None = None,
        transport: torch.device | None = None,
    ) -> None:
        super().__init__(name, parameters)  # without a group: it registers no hooks
        self._parts, self._tree = parts, Tree()
        self._flats = list(buckets(parameters))
        self._over_ranks = RankSum(f"adding up the gradients of {name}", group, transport)
        self._before: Sequence[Tensor] | None = None

    def begin(self) -> None:
        """Set the gradients of the window's earlier steps aside."""
        has_gradients = any(parameter.grad is not None for parameter in self.parameters)
        self._before = [bucket.pack() for bucket in self._flats] if has_gradients else None
        self._tree = Tree()

    def part_done(self) -> None:
        """Add the gradients of one micro-batch; after the last, those of the other ranks too."""
        self._tree.add([bucket.pack() for bucket in self._flats])
        if self._tree.count < self._parts:
            return
        for i, bucket in enumerate(self._flats):
            total = self._over_ranks(self._tree.total[i])
            bucket.unpack(total if self._before is None else self._before[i] + total)
        self._tree, self._before = Tree(), None


class MeanBuffers:
    """A network's buffers: each micro-batch gets a copy of them, which it may change.

    After the step a buffer has moved by the mean of the copies' changes, weighted by samples. An
    integer buffer, such as BatchNorm's counter, moves as in the batch's first micro-batch.

    model: the network; None: one that never learns, whose buffers stay. group, transport: as in
    RankSum.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module | None,
        group: dist.ProcessGroup | None = None,
        transport: torch.device | None = None,
    ) -> None:
        self._buffers = _Buffers.of(model) if model else _Buffers()
        self._over_ranks = RankSum(f"averaging the buffers of {name}", group, transport)
        self._tree, self._before = Tree(), torch.empty(0)

    def begin(self) -> None:
        """Remember the buffers before the step's first forward pass."""
        self._tree, self._before = Tree(), self._buffers.values()

    @contextmanager
    def copied(self, share: float, is_first: bool) -> Iterator[None]:
        """Replace the buffers by copies for the forward pass of one micro-batch.

        The backward pass may need the copies, which later micro-batches leave unchanged. share: the
        micro-batch's share of the batch's samples; 0: it is empty, and is not computed. is_first:
        whether it is the first of the batch.
        """
        with self._buffers.replaced():
            yield
            now, before = self._buffers.values(), self._before
        # Infinity minus infinity is NaN, so a buffer that stays the same needs a case of its own.
        change = torch.where(now == before, 0.0, now - before)
        change[: self._buffers.floats] *= share
        change[self._buffers.floats :] *= float(is_first)
        self._tree.add([change])

    def finish(self) -> None:
        """Apply the changes of all micro-batches, on all ranks."""
        if self._buffers.places:
            (change,) = self._tree.total
            self._buffers.set(self._before + self._over_ranks(change))


@dataclass(frozen=True)
class _Buffers:
    """The buffers of a model by where they are registered; one may be registered several times."""

    places: Sequence[tuple[nn.Module, str]] = ()
    """Module and key of each buffer: numbers with a fraction first, then integers and booleans."""
    floats: int = 0
    """Number of values with a fraction."""

    @classmethod
    def of(cls, model: nn.Module) -> _Buffers:
        places = [
            (module, key, buffer)
            for module in model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_complex()
        ]
        places.sort(key=lambda place: not place[2].is_floating_point())
        floats = sum(buffer.numel() for *_, buffer in places if buffer.is_floating_point())
        return cls([(module, key) for module, key, _ in places], floats)

    @property
    def tensors(self) -> list[Tensor]:
        tensors = [module._buffers[key] for module, key in self.places]
        return [tensor for tensor in tensors if tensor is not None]

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Replace the buffers by copies inside, and put the same tensors back afterwards."""
        before = self.tensors
        copies = {id(tensor): tensor.clone() for tensor in before}
        self._put([copies[id(tensor)] for tensor in before])
        try:
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return all values in float64, which represents them exactly."""
        flat = [tensor.reshape(-1).double() for tensor in self.tensors]
        return torch.cat(flat) if flat else torch.empty(0)

    @torch.no_grad()
    def set(self, values: Tensor) -> None:
        """Change the buffers in place."""
        tensors = self.tensors
        parts = torch.split(values, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for (module, key), tensor in zip(self.places, tensors, strict=True):
            module._buffers[key] = tensor
