"""Batches from a torch DataLoader, with one-line errors if a loader process fails.

A loader process that dies is started again.

Not covered: the contents of a batch (`images.py`); copying it to the device (`prefetch.py`).
"""

from __future__ import annotations

import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import active_children, parent_process
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from switokd.errors import PeerError, SwitokdError, UsageError, summary
from switokd.runtime.environment import describe_rank
from switokd.runtime.lifecycle import print_warning

Batch = tuple[Tensor, Tensor]
"""Images `[B, C, H, W]` in float32, normalised; labels `[B]` or target distributions `[B, C]`."""

Positions = Iterable[Sequence[tuple[int, ...]]]
"""By batch, a tuple for each sample: (epoch, index) or (epoch, index, partner's index)."""


MOST_DEATHS = 3
"""How often loader processes are started again before they deliver a batch."""


class InLoader(Exception):
    """An error in a loader process; the message is its traceback there."""


@dataclass(frozen=True)
class Failed:
    """An error for the user in place of a batch; may come from a loader process."""

    error: SwitokdError
    frames: str
    """Traceback of the error's cause, which is not sent with it; empty without a cause."""

    @classmethod
    def of(cls, error: SwitokdError) -> Failed:
        """Return the error with the traceback of its cause."""
        cause = error.__cause__
        return cls(error, "".join(traceback.format_exception(cause)) if cause else "")

    def as_here(self) -> SwitokdError:
        """Return the error, whose cause has the traceback of the loader process."""
        if self.frames and self.error.__cause__ is None:
            self.error.__cause__ = InLoader(f"\n{self.frames}")
        return self.error


class Undelivered:
    """The positions of the batches, from the first one that was not delivered.

    Loader processes ask for positions ahead. Those of batches that have died with their loader
    process are given out again, in the same order.
    """

    def __init__(self, positions: Positions) -> None:
        self._positions = positions
        self.begin()

    def begin(self) -> None:
        """Start with the first batch."""
        self._rest = iter(self._positions)
        self._given: deque[Sequence[tuple[int, ...]]] = deque()

    def __iter__(self) -> Iterator[Sequence[tuple[int, ...]]]:
        self._rest = chain(tuple(self._given), self._rest)
        self._given.clear()
        for batch in self._rest:
            self._given.append(batch)
            yield batch

    def delivered(self) -> None:
        """Note that the first of the batches has been delivered."""
        self._given.popleft()


class Batches:
    """A data set's batches at given positions.

    May be iterated repeatedly if `positions` may. workers: number of loader processes, which live
    as long as this object; 0: the calling process loads. If one of them dies, all are started
    again: a batch depends on its positions alone, so the same batches follow.
    """

    def __init__(self, view: Dataset[Batch], positions: Positions, workers: int) -> None:
        self._view, self._workers = view, workers
        self._undelivered = Undelivered(positions)
        self.loader = self._new_loader()
        self._processes: list[Any] = []

    def _new_loader(self) -> DataLoader[Batch]:
        return DataLoader(
            self._view,
            batch_sampler=self._undelivered,  # type: ignore[arg-type]
            collate_fn=_as_is,
            generator=torch.Generator(),  # else the loader draws from the default one
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            # A fork of a process with threads of gRPC or collectives may deadlock.
            multiprocessing_context="forkserver" if self._workers else None,
            worker_init_fn=_end_with_rank,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Start the loader processes, unless they run, and yield the batches.

        UsageError for an invalid sample, or a data set that cannot be sent to another process.
        OwnCodeError for a sample that raises. PeerError if loader processes die again and again.
        """
        self._undelivered.begin()
        return self._checked(self._start())

    def _start(self) -> Iterator[Batch | Failed]:
        before = {process.pid for process in active_children()}
        try:
            iterator = iter(self.loader)
        except Exception as error:  # pickle raises many kinds of errors, and a __getstate__ any
            if not self._workers:
                raise
            raise UsageError(
                f"data.workers: the data set cannot be sent to a loader process: {summary(error)}; "
                "keep lambdas, local classes and open files out of it, or set data.workers=0"
            ) from error
        self._processes += [p for p in active_children() if p.pid not in before]
        return iterator

    def _checked(self, iterator: Iterator[Batch | Failed]) -> Iterator[Batch]:
        """Yield batches; raise errors that loader processes returned or caused."""
        deaths = 0
        while True:
            batch: Batch | Failed | None = None
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # Any of these errors may mean that a loader process has died.
                wait([p.sentinel for p in self._processes], timeout=1.0)
                if not (dead := [str(p.pid) for p in self._processes if not p.is_alive()]):
                    raise
                what = f"data loader process {', '.join(dead)} is gone: killed, or out of memory"
                deaths += 1
                if deaths > MOST_DEATHS:
                    raise PeerError(
                        f"{what} (data.workers), {deaths} times without a batch between"
                    ) from error
                print_warning(f"{what} (data.workers); it starts again", describe_rank())
            if batch is None:
                del iterator  # with the loader, it ends the processes that are left
                self.loader, self._processes = self._new_loader(), []
                iterator = self._start()
                continue
            if isinstance(batch, Failed):
                raise batch.as_here()
            deaths = 0
            self._undelivered.delivered()
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
