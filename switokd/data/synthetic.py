"""Images of noise, for runs whose data are not there yet."""

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
    """Noise in place of images that need not be here; the labels go through all classes."""

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
    """The run's images, noise where they are known by name; UsageError if they cannot be opened."""
    found, held_out = known(config.data), config.method.strategy.held_out
    if found is None:
        return open_images(config.data, config.seed, held_out)
    noise, channels = Noise(found), found.image[0]
    half = (0.5,) * channels
    sources = Sources(noise, noise, found.classes, half, half)
    sources = with_fewer(sources, config.data.train_samples)
    return Images(sources, config.data, config.seed, held_out)
