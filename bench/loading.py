"""Whether loading limits training: images per second of the input alone over those of a training.

As CIFAR-100 is loaded: bytes in memory, cropped and flipped, normalised, in the order of channels
that the networks compute in. Training is the smallest that makes sense, one WRN-10-1 teacher and
student, which consumes the most.

Not covered: image files; loader processes (`data.workers`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from bench.figures import Figure, Say, alternate
from bench.images import Noise
from bench.in_process import ONE_PROCESS, InProcess, configured
from bench.runs import BATCH, CLASSES, run_file
from switokd.config import Config
from switokd.data import Images
from switokd.data.sources import ArraySource, Sources
from switokd.memory import keep_freed_memory

FIGURES = ("input_over_training",)
SMALLEST = {"t": ("teacher", "wrn-10-1"), "s": ("student", "wrn-10-1")}


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give input_over_training."""
    say("input against training")
    keep_freed_memory()  # as in training, by default
    steps, rounds = (20, 1) if quick else (60, 5)
    config = configured(run_file(SMALLEST, steps, **ONE_PROCESS))
    ours = InProcess(config, images=_images(config, steps))

    def train() -> float:
        batches = list(ours.batches(steps // 5))
        started = time.perf_counter()
        for x, y in batches:
            ours.step(x, y)
        return len(batches) * BATCH / (time.perf_counter() - started)

    def load() -> float:
        started = time.perf_counter()
        count = sum(len(y) for _, y in ours.batches(steps))
        return count / (time.perf_counter() - started)

    train()
    yield Figure.of_pairs(
        "input_over_training",
        alternate(rounds, load, train),
        target=1.0,
        what="images/s of the input alone over images/s of training two WRN-10-1, one process",
    )


def _images(config: Config, steps: int) -> Images:
    made = [Noise(train, steps * BATCH) for train in (True, False)]
    parts = [ArraySource(each.images, each.labels) for each in made]
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    sources = Sources(parts[0], parts[1], CLASSES, mean, std, crop_padding=4, flip=True)
    return Images(sources, config.data, config.seed)
