"""Labels outside the classes, found before the first step.

Not covered: samples that do not fit otherwise, which are found when they are loaded (`sources.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switokd.data.augment import seeding
from switokd.data.sources import (
    ArraySource,
    ItemSource,
    Source,
    Sources,
    label_of,
)
from switokd.errors import UsageError

Labels = NDArray[np.int64]

LOOK_SECONDS = 10.0
"""How long items are loaded for their labels alone; a data set may be large, and its items slow."""


def check_labels(sources: Sources, where: str) -> None:
    """UsageError if a training or test sample's label is outside the classes.

    Of a data set that is read item by item, `targets` are looked at, as torchvision's data sets
    have them; where there are none, the items, as many as LOOK_SECONDS allow.
    """
    deadline = time.monotonic() + LOOK_SECONDS
    for part, source in (("training", sources.train), ("test", sources.test)):
        found = _first_outside(source, sources.classes, deadline)
        if found is not None:
            index, label = found
            error = UsageError(
                f"{where}, {part} sample {index}: label {label} is outside the "
                f"{sources.classes} classes (0 to {sources.classes - 1})"
            )
            # Near the deadline another rank may not have come so far.
            error.seen_by_every_rank = time.monotonic() < deadline - LOOK_SECONDS / 2
            raise error


def _first_outside(source: Source, classes: int, deadline: float) -> tuple[int, int] | None:
    """Index and label of the first sample found whose label is outside the classes."""
    if isinstance(source, ArraySource):
        for index in _outside(source.labels.cpu().numpy(), classes)[:1]:
            return index, int(source.labels[index])
    if not isinstance(source, ItemSource):
        return None
    targets = _targets(source.items)
    look_at: Sequence[int] = range(len(source)) if targets is None else _outside(targets, classes)
    with seeding() as seed:  # an item's random transforms must not disturb the training's
        for index in look_at:
            if time.monotonic() > deadline:
                return None
            seed(index)
            label = label_of(source.items, index, source.where)
            if not 0 <= label < classes:  # the item's word counts: it may map its targets
                return index, label
    return None


def _outside(labels: Labels, classes: int) -> list[int]:
    """Where labels `[N]` are outside the classes."""
    where: list[int] = np.flatnonzero((labels < 0) | (labels >= classes)).tolist()
    return where


def _targets(items: Any) -> Labels | None:
    """A data set's `targets`, if it has one whole number for each item."""
    found = getattr(items, "targets", None)
    try:
        targets = np.asarray(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    is_right = targets.shape == (len(items),) and targets.dtype.kind in "iu"
    return targets.astype(np.int64) if is_right else None
