"""Batches that every rank finds equal: same images, same pixels, same order.

    sources.py   data sets: images and labels by index
    augment.py   order and augmentation as functions of (seed, epoch, sample index)
    mixup.py    label smoothing, mixup, cutmix
    labels.py    labels outside the classes
    subset.py    a part of the training images
    loader.py    batches at given positions, by loader processes if wanted
    prefetch.py      batches onto the device, one ahead
    (this file)  the training stream and the test set, made of these

A rank loads of each batch the part that its networks need.

Not covered: streams without a length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from switokd.config.sections import Data
from switokd.data.augment import crop_and_flip, mix, order
from switokd.data.labels import check_labels
from switokd.data.loader import (
    Batch,
    Batches,
    Positions,
    in_blocks,
)
from switokd.data.mixup import SoftTargets
from switokd.data.named import open_sources
from switokd.data.sources import ArraySource, Source, Sources
from switokd.data.subset import with_fewer
from switokd.errors import UsageError
from switokd.runtime.device import to_device

__all__ = ["Batch", "Batches", "Images", "open_images"]

NO_EPOCH = 2**40
"""Number of the shuffle that the images held out are drawn by; no run comes to this epoch."""
BLOCK_BYTES, BLOCK_BATCHES = 64 * 2**20, 16
"""Most that are made at once of images that a GPU holds."""


@dataclass(frozen=True)
class View(Dataset[Batch]):
    """A source as the loader reads it: by (epoch, index), whole batches at once."""

    source: Source
    sources: Sources
    seed: int
    crop_padding: int = 0
    flip: bool = False
    soft: SoftTargets | None = None

    def __getitems__(self, positions: Sequence[tuple[int, ...]]) -> Batch | UsageError:
        """Load one batch; the loader calls this with the sampler's list.

        A UsageError is handed over as a value: raised in a loader process, it would reach the
        user wrapped into that process's traceback.
        """
        try:
            return self.batch(positions)
        except UsageError as error:
            return error

    def batch(self, positions: Sequence[tuple[int, ...]]) -> Batch:
        """Images and targets at these `Positions`; UsageError if one does not fit.

        Targets are labels `[B]`, or distributions `[B, C]` where they are soft.
        """
        at = np.array(positions, dtype=np.int64).reshape(len(positions), -1)
        if self.soft is None or not self.soft.mixes:
            x, labels = self._load(at)
            return x, labels if self.soft is None else self.soft.targets(labels)
        both = np.concatenate((at[:, [0, 1]], at[:, [0, 2]]))
        once, places = np.unique(both, axis=0, return_inverse=True)
        x, labels = self._load(once)
        own, partner = to_device(x.device, torch.from_numpy(places.reshape(2, -1)))
        keys = mix(self.seed, at[:, 0], at[:, 1])
        return self.soft.mixed((x[own], x[partner]), (labels[own], labels[partner]), keys)

    def _load(self, at: NDArray[np.int64]) -> Batch:
        """Images and labels at (epoch, index) `[B, 2]`, augmented and normalised."""
        epochs, indices = at.T
        keys = mix(self.seed, epochs, indices)
        images, labels = self.source.fetch(indices.tolist(), keys)
        images = crop_and_flip(images, keys, self.crop_padding, self.flip)
        if images.dtype == torch.uint8:
            mean, std = (_on(images.device, v) for v in (self.sources.mean, self.sources.std))
            images = (images.float() / 255 - mean) / std
        return images.float(), labels

    def __getitem__(self, position: tuple[int, ...]) -> Batch:
        return self.batch([position])


@cache
def _on(device: torch.device, per_channel: tuple[float, ...]) -> torch.Tensor:
    """`[C, 1, 1]`, brought to a device once."""
    return torch.tensor(per_channel, device=device)[:, None, None]


@dataclass(frozen=True)
class Images:
    """A run's images."""

    sources: Sources
    config: Data
    seed: int
    held_out: int = 0
    """Training images that are left out of the training stream, for the strategy."""
    shape: tuple[int, int, int] = field(init=False)
    """Channels, height and width of one image."""

    def __post_init__(self) -> None:
        if not len(self.sources.test):
            raise UsageError(f"data.dataset {self.config.dataset}: the test set is empty")
        if self.held_out and (self.held_out < 0 or self.samples < 2):
            raise UsageError(
                f"distillation.strategy: it holds out {self.held_out} images, which must leave 2 "
                f"or more of the {len(self.sources.train)} training images; choose another "
                "number, as distillation.strategy_kwargs={held_out: N}"
            )
        if not self.steps_per_epoch:
            beside = f" that the strategy's {self.held_out} held out leave" if self.held_out else ""
            raise UsageError(
                f"data.batch_size: {self.config.batch_size} is more than the {self.samples} "
                f"training images{beside}; choose a smaller one, or data.drop_last=false"
            )
        channels, height, width = self.view(train=False)[0, 0][0].shape[1:]
        object.__setattr__(self, "shape", (channels, height, width))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.sources.classes

    @property
    def samples(self) -> int:
        """Number of images trained on."""
        return len(self.sources.train) - self.held_out

    @cached_property
    def split(self) -> tuple[list[int], list[int]]:
        """Indices of the images trained on, and of those held out: drawn by the seed, sorted."""
        n = len(self.sources.train)
        if not self.held_out:
            return list(range(n)), []
        drawn = order(self.seed, NO_EPOCH, n)
        return sorted(drawn[self.held_out :]), sorted(drawn[: self.held_out])

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the training set."""
        whole, rest = divmod(self.samples, self.config.batch_size)
        # A last batch of one sample would leave BatchNorm without a variance.
        return whole + (rest > 1 and not self.config.drop_last)

    def size_of(self, step: int) -> int:
        """Samples of the batch of `step`, counted from 0."""
        begin = step % self.steps_per_epoch * self.config.batch_size
        return min(self.config.batch_size, self.samples - begin)

    def stream(
        self, steps: int, first: int = 0, part: Callable[[int], slice] = lambda n: slice(0, n)
    ) -> Iterator[Batch]:
        """Training batches `first` to `steps - 1` of the run, over as many epochs as that takes.

        part: which part of a batch of n samples is wanted; all of it by default.
        """
        positions, view = TrainingPositions(self, first, steps, part), self.view(train=True)
        if self._are_on_gpu:
            image = 4 * math.prod(self.shape)  # bytes, in float32
            most = BLOCK_BYTES // (image * self.config.batch_size)
            return in_blocks(view.batch, positions, min(max(most, 1), BLOCK_BATCHES))
        return iter(self._batches(view, positions))

    def held_out_batches(self, part: Callable[[int], slice]) -> Batches:
        """The images held out, without augmentation, in batches of data.batch_size; see `stream`.

        May be iterated again and again. The training transforms of a data set that is read item
        by item remain, drawn alike every time.
        """
        size, indices = self.config.batch_size, self.split[1]
        wholes = [indices[a : a + size] for a in range(0, len(indices), size)]
        positions = [[(0, i) for i in whole[part(len(whole))] or whole[:1]] for whole in wholes]
        return self._batches(View(self.sources.train, self.sources, self.seed), positions)

    def test(self, batch_size: int = 512, index: int = 0, of: int = 1) -> Batches:
        """The test set in order, without augmentation; may be iterated again and again.

        of: into how many parts it is dealt out, batch by batch; index: which of them.
        """
        n = len(self.sources.test)
        starts = range(index * batch_size, n, of * batch_size)
        positions = [[(0, i) for i in range(a, min(a + batch_size, n))] for a in starts]
        return self._batches(self.view(train=False), positions)

    def on(self, device: torch.device, wanted: bool | None) -> Images:
        """The same images held on `device`, if wanted, or (None) if there is ample room.

        UsageError if they are wanted there and not all in memory.
        """
        parts = (self.sources.train, self.sources.test)
        arrays = [part for part in parts if isinstance(part, ArraySource)]
        if device.type != "cuda" or wanted is False:
            return self
        if len(arrays) < len(parts):
            if wanted:
                raise UsageError(
                    f"compute.data_on_device: {self.config.dataset} is read image by image; only "
                    "data sets that are in memory as a whole can be held on the GPU"
                )
            return self
        size = sum(array.images.nbytes for array in arrays)
        if wanted is None and size > torch.cuda.mem_get_info(device)[0] / 20:
            return self
        train, test = (array.to(device) for array in arrays)
        return replace(self, sources=replace(self.sources, train=train, test=test))

    @property
    def _are_on_gpu(self) -> bool:
        train = self.sources.train
        return isinstance(train, ArraySource) and train.images.is_cuda

    def _batches(self, view: View, positions: Positions) -> Batches:
        return Batches(view, positions, 0 if self._are_on_gpu else self.config.workers)

    def view(self, train: bool) -> View:
        if not train:
            return View(self.sources.test, self.sources, self.seed)
        padding, flip = self.config.crop_padding, self.config.flip
        return View(
            self.sources.train,
            self.sources,
            self.seed,
            self.sources.crop_padding if padding is None else padding,
            self.sources.flip if flip is None else flip,
            SoftTargets.of(self.config, self.classes),
        )


@dataclass(frozen=True)
class TrainingPositions:
    """Of training batches: the `Positions` of every sample, batch by batch."""

    images: Images
    first: int
    steps: int
    part: Callable[[int], slice]

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        size, trained_on = self.images.config.batch_size, self.images.split[0]
        soft = SoftTargets.of(self.images.config, self.images.classes)
        indices: list[int] = []
        for step in range(self.first, self.steps):
            epoch, batch = divmod(step, self.images.steps_per_epoch)
            if batch == 0 or not indices:
                shuffled = order(self.images.seed, epoch, self.images.samples)
                indices = [trained_on[i] for i in shuffled]
            whole = indices[batch * size : (batch + 1) * size]
            # Where this rank's part is empty, one sample keeps the loader going; nobody uses it.
            part = self.part(len(whole))
            columns = [whole[part] or whole[:1]]
            if soft is not None and soft.mixes:  # with the next sample of the batch
                partners = whole[1:] + whole[:1]
                columns.append(partners[part] or partners[:1])
            yield [(epoch, *sample) for sample in zip(*columns, strict=True)]


def open_images(config: Data, seed: int, held_out: int = 0) -> Images:
    """Open the run file's data set; UsageError if it is missing, empty or does not fit.

    held_out: training images that nobody trains on.
    """
    sources = open_sources(config)
    check_labels(sources, f"data.dataset {config.dataset}")
    sources = with_fewer(sources, config.train_samples)
    return Images(sources, config, seed, held_out)
