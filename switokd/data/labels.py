"""Check of all labels before the first step: they must be 0 to classes - 1.

Not covered: other invalid samples, which raise errors when they are loaded (`sources.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from switokd.data.augment import seeding
from switokd.data.sources import ArraySource, ItemSource, Source, Sources
from switokd.errors import UsageError

Labels = NDArray[np.int64]
"""Labels `[N]` of a whole data set."""

LOOK_SECONDS = 10.0
"""Seconds in which items are loaded only for their labels; a data set may be large and slow."""


def check_labels(sources: Sources, where: str) -> None:
    """UsageError for the first training or test sample whose label is outside the classes.

    where: names the data set in the error. A data set that is read item by item may list its
    labels as `targets`, as torchvision's do. Without them, items are loaded for LOOK_SECONDS.
    """
    deadline = time.monotonic() + LOOK_SECONDS
    for part, source in (("training", sources.train), ("test", sources.test)):
        invalid = _first_outside(source, sources.classes, deadline)
        if invalid is not None:
            index, label = invalid
            # Near the deadline another rank may not have come so far.
            in_time = time.monotonic() < deadline - LOOK_SECONDS / 2
            raise UsageError(
                f"{where}, {part} sample {index}: label {label} is outside the "
                f"{sources.classes} classes (0 to {sources.classes - 1})",
                every_rank=in_time,
            )


def _first_outside(source: Source, classes: int, deadline: float) -> tuple[int, int] | None:
    """Return index and label of the first sample whose label is outside the classes.

    None if there is none, or the deadline (on the monotonic clock) passes before.
    """
    if isinstance(source, ArraySource):
        for index in _outside(source.labels.cpu().numpy(), classes)[:1]:
            return index, int(source.labels[index])
    if not isinstance(source, ItemSource):
        return None
    targets = _targets(source)
    suspects: Sequence[int] = range(len(source)) if targets is None else _outside(targets, classes)
    with seeding() as seed:  # transforms of the items must not change the training's generators
        for index in suspects:
            if time.monotonic() > deadline:
                return None
            seed(index)
            label, _ = source.label_of(index)
            if not 0 <= label < classes:  # the item decides: it may map its target
                return index, label
    return None


def _outside(labels: Labels, classes: int) -> list[int]:
    """Return the indices of labels `[N]` that are outside the classes."""
    indices: list[int] = np.flatnonzero((labels < 0) | (labels >= classes)).tolist()
    return indices


def _targets(source: ItemSource) -> Labels | None:
    """Return a data set's `targets`; None unless they are one whole number per item."""
    try:
        targets = np.asarray(getattr(source.items, "targets", None))
    except Exception:  # a property may raise anything; the items' own labels decide
        return None
    are_labels = targets.shape == (len(source),) and targets.dtype.kind in "iu"
    return targets.astype(np.int64) if are_labels else None
