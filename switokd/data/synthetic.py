"""Images of noise, for plans and checks without the data set's files.

Not covered: data sets of unknown shape, which must be opened (`named.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switokd.config.config import Config
from switokd.data.augment import Keys
from switokd.data.catalog import KnownData, known
from switokd.data.images import Images, open_images
from switokd.data.sources import Sources
from switokd.data.subset import with_fewer


@dataclass(frozen=True)
class Noise:
    """Noise in the shape and number of a data set's images; labels run through all classes."""

    data: KnownData

    def __len__(self) -> int:
        return self.data.samples

    def fetch(self, indices: Sequence[int], keys: Keys) -> tuple[Tensor, Tensor]:
        """See `Source`."""
        generator = torch.Generator().manual_seed(int(keys[0]) % 2**63)
        size = (len(indices), *self.data.image)
        images = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        return images, torch.tensor([index % self.data.classes for index in indices])


def images_for(config: Config) -> Images:
    """Return noise for a data set of known shape; open any other data set.

    UsageError if that data set cannot be opened.
    """
    data, held_out = known(config.data), config.method.strategy.held_out
    if data is None:
        return open_images(config.data, config.seed, held_out)
    noise = Noise(data)
    half = (0.5,) * data.image[0]
    sources = Sources(noise, noise, data.classes, half, half)
    sources = with_fewer(sources, config.data.train_samples)
    return Images(sources, config.data, config.seed, held_out)
