"""A run's images: the stream of training batches and the test set, equal on every rank.

    named.py     opening a data set by its name in the run file
    image_folder.py, tiny_imagenet.py    data sets of image files, found by image_files.py
    pictures.py  any picture as bytes of grey or RGB
    sources.py   images and labels by index
    augment.py   order and augmentation as functions of (seed, epoch, sample index)
    mixup.py     label smoothing, mixup, cutmix
    labels.py    check of the labels before the first step
    subset.py    fewer training images
    loader.py    batches at given positions, with loader processes
    prefetch.py  batches to the device, one step ahead
    (this file)  training stream, held-out images and test set

A rank loads only the part of a batch that its networks need.

Not covered: data sets without a length.
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

from switokd.config.data_section import Data
from switokd.data.augment import crop_and_flip, mix, order, seeding
from switokd.data.labels import check_labels
from switokd.data.loader import Batch, Batches, Failed, Positions, in_blocks
from switokd.data.mixup import SoftTargets
from switokd.data.named import open_sources
from switokd.data.sources import ArraySource, Source, Sources
from switokd.data.subset import with_fewer
from switokd.errors import SwitokdError, UsageError
from switokd.runtime.device import to_device

__all__ = ["Batch", "Batches", "Images", "open_images"]

NO_EPOCH = 2**40
"""Epoch number of the shuffle that draws the held-out images; no run has so many epochs."""
BLOCK_BYTES, BLOCK_BATCHES = 64 * 2**20, 16
"""Largest size and number of batches that are augmented at once on a GPU."""


@dataclass(frozen=True)
class View(Dataset[Batch]):
    """A source with its augmentation, for the loader: whole batches by (epoch, index)."""

    source: Source
    sources: Sources
    seed: int
    crop_padding: int = 0
    flip: bool = False
    soft: SoftTargets | None = None
    """Soft targets and mixing of samples; None: targets are labels."""

    def __getitems__(self, positions: Sequence[tuple[int, ...]]) -> Batch | Failed:
        """Load one batch; torch's DataLoader calls this with the positions of the batch.

        Returns an error for the user instead of raising it: an error raised in a loader process
        reaches the user with the traceback of that process.
        """
        try:
            return self.batch(positions)
        except SwitokdError as error:
            return Failed.of(error)

    def batch(self, positions: Sequence[tuple[int, ...]]) -> Batch:
        """Load images and targets at these `Positions`; errors of a sample as in `ItemSource`.

        Returns images `[B, C, H, W]` in float32, normalised, and labels `[B]`, or distributions
        `[B, classes]` with soft targets.
        """
        at = np.array(positions, dtype=np.int64).reshape(len(positions), -1)
        if self.soft is None or not self.soft.mixes:
            x, labels = self._load(at)
            return x, labels if self.soft is None else self.soft.targets(labels)
        # Most samples are the partner of another one: load every sample once.
        both = np.concatenate((at[:, [0, 1]], at[:, [0, 2]]))
        distinct, places = np.unique(both, axis=0, return_inverse=True)
        x, labels = self._load(distinct)
        own, partner = to_device(x.device, torch.from_numpy(places.reshape(2, -1)))
        keys = mix(self.seed, at[:, 0], at[:, 1])
        return self.soft.mixed((x[own], x[partner]), (labels[own], labels[partner]), keys)

    def _load(self, at: NDArray[np.int64]) -> Batch:
        """Load images and labels at (epoch, index) `[B, 2]`, augmented and normalised."""
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
    """Return values per channel as `[C, 1, 1]` on a device; cached, so copied only once."""
    return torch.tensor(per_channel, device=device)[:, None, None]


@dataclass(frozen=True)
class Images:
    """A run's training and test images, and the batches made of them.

    UsageError if the test set is empty, or the training set is smaller than a batch.
    """

    sources: Sources
    config: Data
    seed: int
    held_out: int = 0
    """Number of training images that the strategy keeps out of the training stream."""
    shape: tuple[int, int, int] = field(init=False)
    """Channels, height and width of one image."""

    def __post_init__(self) -> None:
        if not len(self.sources.test):
            raise UsageError(f"data.dataset {self.config.dataset}: the test set is empty")
        if self.held_out and (self.held_out < 0 or self.samples < 2):
            raise UsageError(
                f"distillation.strategy: it holds out {self.held_out} of the "
                f"{len(self.sources.train)} training images, and at least 2 must remain; set "
                "distillation.strategy_kwargs={held_out: N}"
            )
        if not self.steps_per_epoch:
            held_out = f" (the strategy holds out {self.held_out})" if self.held_out else ""
            raise UsageError(
                f"data.batch_size: {self.config.batch_size} is more than the {self.samples} "
                f"training images{held_out}; choose a smaller one, or data.drop_last=false"
            )
        channels, height, width = self.view(train=False)[0, 0][0].shape[1:]
        if (padding := self.view(train=True).crop_padding) > min(height, width):
            raise UsageError(
                f"data.crop_padding: {padding} is more than the {min(height, width)} pixels of an "
                "image's shorter side"
            )
        object.__setattr__(self, "shape", (channels, height, width))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.sources.classes

    @property
    def samples(self) -> int:
        """Number of training images without the held-out ones."""
        return len(self.sources.train) - self.held_out

    @cached_property
    def split(self) -> tuple[list[int], list[int]]:
        """Indices of the training images and of the held-out images, both sorted.

        The seed decides which images are held out.
        """
        n = len(self.sources.train)
        if not self.held_out:
            return list(range(n)), []
        shuffled = order(self.seed, NO_EPOCH, n)
        return sorted(shuffled[self.held_out :]), sorted(shuffled[: self.held_out])

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one pass over the training images."""
        whole, rest = divmod(self.samples, self.config.batch_size)
        # BatchNorm cannot compute a variance from a last batch of one sample.
        return whole + (rest > 1 and not self.config.drop_last)

    def size_of(self, step: int) -> int:
        """Return the number of samples in the batch of `step`; steps count from 0."""
        begin = step % self.steps_per_epoch * self.config.batch_size
        return min(self.config.batch_size, self.samples - begin)

    def index_of(self, step: int, position: int) -> int:
        """Return the index, in the data set, of the image at a position of the batch of `step`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        shuffled = order(self.seed, epoch, self.samples)
        return self.split[0][shuffled[batch * self.config.batch_size + position]]

    def stream(
        self, steps: int, first: int = 0, part: Callable[[int], slice] = lambda n: slice(0, n)
    ) -> Iterator[Batch]:
        """Yield the training batches of steps `first` to `steps - 1`, over all epochs in between.

        part: maps the size of a batch to the part of it to load; the whole batch by default.
        """
        positions, view = TrainingPositions(self, first, steps, part), self.view(train=True)
        if self._are_on_gpu:
            image = 4 * math.prod(self.shape)  # bytes, in float32
            batches = BLOCK_BYTES // (image * self.config.batch_size)
            return in_blocks(view.batch, positions, min(max(batches, 1), BLOCK_BATCHES))
        return iter(self._batches(view, positions))

    def held_out_batches(self, part: Callable[[int], slice]) -> Batches:
        """Return the held-out images in batches of data.batch_size, without augmentation.

        part: as in `stream`. May be iterated repeatedly. A data set that is read item by item
        keeps its own training transforms, with the same random numbers every time.
        """
        size, indices = self.config.batch_size, self.split[1]
        batches = [indices[a : a + size] for a in range(0, len(indices), size)]
        positions = [[(0, i) for i in batch[part(len(batch))] or batch[:1]] for batch in batches]
        return self._batches(View(self.sources.train, self.sources, self.seed), positions)

    def test(self, batch_size: int = 512, index: int = 0, of: int = 1) -> Batches:
        """Return the test set in order, without augmentation; may be iterated repeatedly.

        of: number of readers that share the test set, batch by batch in turn. index: number of
        this reader, from 0.
        """
        n = len(self.sources.test)
        starts = range(index * batch_size, n, of * batch_size)
        positions = [[(0, i) for i in range(a, min(a + batch_size, n))] for a in starts]
        return self._batches(self.view(train=False), positions)

    def on(self, device: torch.device, wanted: bool | None) -> Images:
        """Return the images with their arrays on a GPU, or unchanged.

        wanted: True: hold them on `device`; False: do not; None: if they take less than a
        twentieth of the free GPU memory. UsageError if wanted for images that are not arrays.
        """
        parts = (self.sources.train, self.sources.test)
        arrays = [part for part in parts if isinstance(part, ArraySource)]
        if device.type != "cuda" or wanted is False:
            return self
        if len(arrays) < len(parts):
            if wanted:
                raise UsageError(
                    f"compute.data_on_device: {self.config.dataset} is read image by image; only "
                    "a data set that is in memory as a whole can be held on the GPU"
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
        """Return the training images with the run's augmentation, or the plain test images."""
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
    """The `Positions` of training batches `first` to `steps - 1`, in the parts to load."""

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
            # The loader needs at least one sample; if this rank's part is empty, nobody uses it.
            part = self.part(len(whole))
            columns = [whole[part] or whole[:1]]
            if soft is not None and soft.mixes:  # a partner is the next sample of the batch
                partners = whole[1:] + whole[:1]
                columns.append(partners[part] or partners[:1])
            yield [(epoch, *sample) for sample in zip(*columns, strict=True)]


def open_images(config: Data, seed: int, held_out: int = 0) -> Images:
    """Open the run file's data set; UsageError if it is missing, empty or invalid.

    held_out: number of training images to keep out of the training stream.
    """
    with seeding() as seed_for_data:  # what a user's data set draws once, the same for every seed
        seed_for_data(0)
        sources = open_sources(config)
    check_labels(sources, f"data.dataset {config.dataset}")
    sources = with_fewer(sources, config.train_samples)
    return Images(sources, config, seed, held_out)
