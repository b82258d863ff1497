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
from bench.in_process import ONE_PROCESS, InProcess, configured, in_memory
from bench.runs import BATCH, run_file
from switokd.memory import keep_freed_memory

FIGURES = ("input_over_training",)
SMALLEST = {"t": ("teacher", "wrn-10-1"), "s": ("student", "wrn-10-1")}


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give input_over_training."""
    say("input against training")
    keep_freed_memory()  # as in training, by default
    steps, rounds = (20, 1) if quick else (60, 5)
    config = configured(run_file(SMALLEST, steps, **ONE_PROCESS))
    ours = InProcess(config, images=in_memory(config, steps * BATCH))

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
