"""Several GPUs: the exchange over NCCL, the time of all-reduces, and strong scaling.

NCCL needs one rank per GPU. This part needs at least two GPUs and uses all GPUs of the machine.

Not covered: GPUs of several machines. This part has never run, because there was no second GPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench import collectives, runs
from bench.against import EQUAL
from bench.figures import Figure, Say, alternate
from bench.runs import BATCH, CLASSES

FIGURES = ("nccl_exchange_over_all_gather", "nccl_scaling")


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield nccl_exchange_over_all_gather and nccl_scaling; nothing with fewer than two GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2:
        say(f"{gpus} GPUs: NCCL needs at least 2")
        return
    say(f"the exchange over NCCL between {gpus} GPUs")
    pairs, links = collectives.exchange(gpus, "cuda", 3 if quick else 7)
    yield Figure.of_pairs(
        "nccl_exchange_over_all_gather",
        pairs,
        what=f"logits and labels of {BATCH} samples, {CLASSES} classes, {gpus} GPUs, on the host",
        details={"ranks": gpus, "links": links},
    )
    say(f"2T1S replicated on {gpus} GPUs against one")
    steps, rounds = (20, 1) if quick else (100, 3)
    config = {
        **runs.run_file(EQUAL["2T1S"], steps, batch=BATCH * gpus, placement="replicated"),
        "device": "cuda",
    }
    pairs = alternate(
        rounds,
        lambda: runs.train(config, 1).step_seconds,
        lambda: gpus * runs.train(config, gpus).step_seconds,
    )
    yield Figure.of_pairs(
        "nccl_scaling",
        pairs,
        what=f"efficiency of {gpus} GPUs against one, {BATCH * gpus} images, strong scaling",
        details={"gpus": gpus},
    )
