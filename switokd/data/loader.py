"""Batches from a torch DataLoader, with one-line errors if a loader process fails or dies.

Not covered: the contents of a batch (`images.py`); copying it to the device (`prefetch.py`).
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
"""By batch, a tuple for each sample: (epoch, index) or (epoch, index, partner's index)."""


class Batches:
    """A data set's batches at given positions.

    May be iterated repeatedly if `positions` may. workers: number of loader processes, which live
    as long as this object; 0: the calling process loads.
    """

    def __init__(self, view: Dataset[Batch], positions: Positions, workers: int) -> None:
        self.loader: DataLoader[Batch] = DataLoader(
            view,
            batch_sampler=positions,  # type: ignore[arg-type]
            collate_fn=_as_is,
            generator=torch.Generator(),  # else the loader draws from the default one
            num_workers=workers,
            persistent_workers=workers > 0,
            # A fork of a process with threads of gRPC or collectives may deadlock.
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_end_with_rank,
        )
        self._processes: list[Any] = []

    def __iter__(self) -> Iterator[Batch]:
        """Start the loader processes, unless they run, and yield the batches.

        UsageError for an invalid sample, PeerError if a loader process has died.
        """
        before = {process.pid for process in active_children()}
        iterator = iter(self.loader)
        self._processes += [p for p in active_children() if p.pid not in before]
        return self._checked(iterator)

    def _checked(self, iterator: Iterator[Batch | UsageError]) -> Iterator[Batch]:
        """Yield batches; raise errors that loader processes returned or caused."""
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                # Any of these errors may mean that a loader process has died.
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
    """Yield batches at given positions; `load` makes up to `most` of them at once.

    For images in GPU memory: the host takes as long to launch the kernels for one batch as for
    many.
    """
    remaining = iter(positions)
    while block := list(islice(remaining, most)):
        sizes = [len(batch) for batch in block]
        x, y = load([position for batch in block for position in batch])
        yield from zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)


def _end_with_rank(worker: int) -> None:
    """Let this loader process end with its rank, even if the rank is killed.

    torch's own check watches the parent process, which is the fork server here. The fork server
    lives until all its children have ended.
    """
    rank = parent_process()
    assert rank is not None

    def follow() -> None:
        rank.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def _as_is(batch: Any) -> Any:
    """Return the batch unchanged: `View` has collated it."""
    return batch
