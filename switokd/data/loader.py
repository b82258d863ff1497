"""Batches out of a torch DataLoader, with its processes' ends and errors in a line.

Not covered: what is in the batches (`data/__init__.py`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import active_children, parent_process
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from switokd.errors import PeerError, UsageError

Batch = tuple[Tensor, Tensor]
"""Images `[B, C, H, W]` in float32, normalised; labels `[B]` or target distributions `[B, C]`."""

Positions = Iterable[Sequence[tuple[int, ...]]]
"""(epoch, index) or (epoch, index, partner's index) of every sample, batch by batch."""


class Batches:
    """A data set's batches at given positions; may be iterated again where `positions` may."""

    def __init__(self, view: Dataset[Batch], positions: Positions, workers: int) -> None:
        self.loader: DataLoader[Batch] = DataLoader(
            view,
            batch_sampler=positions,  # type: ignore[arg-type]
            collate_fn=_as_is,
            generator=torch.Generator(),  # else it draws from the global one, as dropout does
            num_workers=workers,
            persistent_workers=workers > 0,
            # Never fork a process that has gRPC or collective threads.
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_end_with_rank,
        )
        self._processes: list[Any] = []

    def __iter__(self) -> Iterator[Batch]:
        """Start the loader's processes, unless they run, and give their batches.

        UsageError if a sample does not fit, PeerError if a loader process is gone.
        """
        before = {process.pid for process in active_children()}
        iterator = iter(self.loader)
        self._processes += [p for p in active_children() if p.pid not in before]
        return self._checked(iterator)

    def _checked(self, iterator: Iterator[Batch | UsageError]) -> Iterator[Batch]:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                # The loader's queue breaks in one of several ways when a process of it dies.
                wait([p.sentinel for p in self._processes], timeout=1.0)
                if not (dead := [str(p.pid) for p in self._processes if not p.is_alive()]):
                    raise
                raise PeerError(
                    f"data loader process {', '.join(dead)} is gone: killed, or out of memory "
                    "(data.workers)"
                ) from error
            if isinstance(batch, UsageError):
                raise batch
            yield batch


def in_blocks(
    load: Callable[[Sequence[tuple[int, ...]]], Batch], positions: Positions, most: int
) -> Iterator[Batch]:
    """Batches at given positions, loaded up to `most` at a time and cut apart.

    For images that a GPU holds: to launch its kernels takes the host as long for one batch as for
    many.
    """
    left = iter(positions)
    while block := list(islice(left, most)):
        sizes = [len(batch) for batch in block]
        x, y = load([position for batch in block for position in batch])
        yield from zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)


def _end_with_rank(worker: int) -> None:
    """In a loader process: end as soon as the rank has, however it ended.

    torch's own watch looks at the parent process id, which is the fork server's here; and that
    lives for as long as its children do.
    """
    rank = parent_process()
    assert rank is not None

    def follow() -> None:
        rank.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def _as_is(batch: Any) -> Any:
    return batch
