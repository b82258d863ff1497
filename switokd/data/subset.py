"""A part of the training images, for studies that must be short: `data.train_samples`.

The part is drawn once and is the same for every seed, so that runs of several seeds differ in
weights and order, not in data.

Not covered: an equal number of each class; the test set, which stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from switokd.data.augment import Keys
from switokd.data.sources import ArraySource, Source, Sources
from switokd.errors import UsageError

DRAW = 20220916
"""Seed of the drawing."""


@dataclass(frozen=True)
class Subset:
    """Some samples of a source, in its order."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """See `Source`."""
        return self.source.fetch([self.indices[i] for i in indices], keys)


def with_fewer(sources: Sources, samples: int | None) -> Sources:
    """The data set with so many training images; None for all. UsageError if there are fewer."""
    whole = sources.train
    if samples is None or samples == len(whole):
        return sources
    if samples > len(whole):
        raise UsageError(
            f"data.train_samples: {samples} is more than the {len(whole)} training images"
        )
    drawn = np.sort(np.random.default_rng(DRAW).permutation(len(whole))[:samples])
    if isinstance(whole, ArraySource):
        at = torch.from_numpy(drawn)
        return replace(sources, train=ArraySource(whole.images[at], whole.labels[at]))
    return replace(sources, train=Subset(whole, tuple(drawn.tolist())))
