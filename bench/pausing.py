"""What a pause saves its teacher: the step's time when paused over the time when learning.

A real teacher, WRN-16-2, goes through the real step in one process; its student is next to nothing
(`simulated.py`), and who pauses is forced, in turn. What remains of a paused step is the forward
pass, exchange and loss of all, and the student's next to nothing.

Not covered: the pause's effect on other ranks, which wait less (`summary.json` has that of a run).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch

from bench.figures import Figure, Say
from bench.runs import BATCH, CLASSES, run_file
from switokd.alone import Alone
from switokd.config import Config
from switokd.decision import Mode, Rule, decide
from switokd.distances import Parts, means
from switokd.environment import Environment
from switokd.exchange import Exchange
from switokd.memory import keep_freed_memory
from switokd.placement import Place
from switokd.setup import make_learners, make_models
from switokd.step import train_step
from switokd.world import World


class Forced(Alone):
    """Decides as it is told."""

    mode = Mode.LEARNING

    def report(self, step: int, parts: Parts, exchange_seconds: float | None = None) -> None:
        """Decide as `mode` says."""
        self._last = decide(step, means(parts), Rule(lambda d, delta: self.mode))


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give paused_over_learning, for fp32 and bf16."""
    keep_freed_memory()  # as in training, by default
    for name, precision in (
        ("paused_over_learning", "fp32"),
        ("paused_over_learning_bf16", "bf16"),
    ):
        say(f"paused against learning, {precision}")
        yield _measure(name, precision, 3 if quick else 7)


def _measure(name: str, precision: str, rounds: int) -> Figure:
    raw: dict[str, Any] = run_file(
        {"t": ("teacher", "wrn-16-2"), "s": ("student", "bench.simulated:Waiting")},
        steps=1,
        placement="replicated",
        coordinator={"address": "off"},
        compute={"precision": precision},
    )
    no_time = {"seconds_per_sample_forward": 0.0, "seconds_per_sample_backward": 0.0}
    raw["networks"]["s"]["model_kwargs"] = no_time
    config = Config.model_validate(raw)
    step = _step(config)
    for mode in Mode:
        step(mode)
    pairs = [
        tuple(median(step(mode) for _ in range(3)) for mode in (Mode.EXPERT, Mode.LEARNING))
        for _ in range(rounds)
    ]
    return Figure.of_pairs(
        name,
        [(a, b) for a, b in pairs],
        target=0.4 if precision == "fp32" else None,
        at_least=False,
        what=f"a WRN-16-2 teacher's step, paused over learning, {precision}, one process",
    )


def _step(config: Config):  # type: ignore[no-untyped-def]
    """Seconds of one step, as a function of what is decided in it."""
    from switokd.data import open_images

    images, world = open_images(config.data, config.seed), World(Environment(), torch.device("cpu"))
    place = Place(config.placement_on(1), 0)
    learners = make_learners(
        config, place, make_models(config, place.networks, images), world, images.shape
    )
    exchange, decider = (
        Exchange(place, config.digest, CLASSES),
        Forced(config, lambda decision: None),
    )
    x, y = next(images.stream(1))
    x = x.contiguous(memory_format=torch.channels_last)

    def step(mode: Mode) -> float:
        decider.mode = mode
        started = time.perf_counter()
        train_step(learners, 1, x, y, BATCH, config.method, exchange, decider)
        return time.perf_counter() - started

    return step
