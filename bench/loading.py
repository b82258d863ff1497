"""Whether loading limits training: loaded images per second, divided by trained ones.

Two kinds of input are measured. Images like CIFAR-100 are bytes in memory, which are cropped,
flipped and normalised. Small JPEG files are decoded by one loader process (`data.workers`) per
core. On a CPU, training shares the cores with the loader processes.

The training is the smallest useful one, with a WRN-10-1 teacher and student, because small
networks need the most images per second.

Not covered: photographs, which take longer to decode; files outside the file system's cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from PIL import Image

from bench.figures import Figure, Say, alternate
from bench.images import NoiseImages
from bench.in_process import ONE_PROCESS, InProcess, configured, in_memory
from bench.runs import BATCH, run_file
from switokd.runtime.allocator import keep_freed_memory
from switokd.runtime.environment import cores

FIGURES = ("input_over_training", "input_files_over_training")
SMALLEST = {"t": ("teacher", "wrn-10-1"), "s": ("student", "wrn-10-1")}
PICTURES, SIDE, CLASSES = 4 * BATCH, 64, 4
AHEAD = 2
"""Batches that each loader process prefetches (PyTorch's default)."""


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield input_over_training and input_files_over_training."""
    keep_freed_memory()  # the default in training
    steps, rounds = (5, 1) if quick else (60, 5)
    raw = run_file(SMALLEST, steps, **ONE_PROCESS)
    say("input against training")
    config = configured(raw)
    yield Figure.of_pairs(
        "input_over_training",
        _pairs(InProcess(config, images=in_memory(config, steps * BATCH)), steps, rounds),
        target=1.0,
        what="images/s of the input alone over images/s of training two WRN-10-1, one process",
    )
    say("input from files against training")
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        files = {"dataset": "image-folder", "root": folder, "image_size": SIDE}
        data = {**files, "batch_size": BATCH, "workers": cores()}
        yield Figure.of_pairs(
            "input_files_over_training",
            _pairs(InProcess(configured({**raw, "data": data})), steps, rounds),
            what=f"the same for JPEG files of {SIDE} x {SIDE} pixels, {cores()} loader processes",
        )


def _pairs(ours: InProcess, steps: int, rounds: int) -> list[tuple[float, float]]:
    """Images per second of (input alone, training), by round."""
    count = steps // 5
    unmeasured = 1 + AHEAD * ours.config.data.workers  # prefetched batches
    batches = ours.batches(count + rounds * (unmeasured + steps))
    ready = list(islice(batches, count))

    def train() -> float:
        ours.step(*ready[0])  # the loader processes finish prefetching meanwhile
        started = time.perf_counter()
        for x, y in ready:
            ours.step(x, y)
        return len(ready) * BATCH / (time.perf_counter() - started)

    def load() -> float:
        for _ in islice(batches, unmeasured):
            pass
        started = time.perf_counter()
        loaded = sum(len(y) for _, y in islice(batches, steps))
        return loaded / (time.perf_counter() - started)

    train()
    return alternate(rounds, load, train)


def write_pictures(root: Path) -> None:
    """Write JPEG files of noise: train/CLASS/*.jpg, and a tenth as many val/CLASS/*.jpg."""
    for part in ("train", "val"):
        pictures = NoiseImages(part == "train", PICTURES, CLASSES, SIDE, seen=CLASSES)
        for i in range(len(pictures)):
            image, label = pictures[i]
            folder = root / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.jpg")
