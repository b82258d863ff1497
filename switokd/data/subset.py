"""Fewer training images, for short studies: `data.train_samples`.

The same images are drawn for every seed. So runs with several seeds differ in weights and order,
not in data.

Not covered: the same number of images per class; the test set, which stays whole.
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
"""Seed of the random choice."""


@dataclass(frozen=True)
class Subset:
    """Some samples of a source, in the source's order."""

    source: Source
    indices: tuple[int, ...]
    """Indices of the chosen samples in the source, ascending."""

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """See `Source`."""
        return self.source.fetch([self.indices[i] for i in indices], keys)


def with_fewer(sources: Sources, samples: int | None) -> Sources:
    """Return the data set with `samples` training images; None: with all of them.

    UsageError if the data set has fewer.
    """
    train = sources.train
    if samples is None or samples == len(train):
        return sources
    if samples > len(train):
        raise UsageError(
            f"data.train_samples: {samples} is more than the {len(train)} training images"
        )
    indices = np.sort(np.random.default_rng(DRAW).permutation(len(train))[:samples])
    if isinstance(train, ArraySource):
        at = torch.from_numpy(indices)
        return replace(sources, train=ArraySource(train.images[at], train.labels[at]))
    return replace(sources, train=Subset(train, tuple(indices.tolist())))
