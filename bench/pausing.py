"""Time that a pause saves a teacher: time of a paused step over time of a learning step.

A real WRN-16-2 teacher runs the real step in one process. Its student (`simulated.py`) needs
almost no time. The teacher's mode is forced, alternately. A paused step still has the teacher's
forward pass, the exchange and the student's loss.

Not covered: shorter waits of other ranks during a pause (see summary.json of a run).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from bench.figures import Figure, Say
from bench.in_process import ONE_PROCESS, InProcess, configured
from bench.runs import BATCH, QUICK_BATCH, run_file
from switokd.coordination.local import LocalDecider
from switokd.distillation.decision import Mode, Rule, decide
from switokd.distillation.distances import Parts, means
from switokd.runtime.allocator import keep_freed_memory

FIGURES = ("paused_over_learning", "paused_over_learning_bf16")


class Forced(LocalDecider):
    """Decides every step with the mode in `mode`."""

    mode = Mode.LEARNING

    def report(self, step: int, parts: Parts, exchange_seconds: float | None = None) -> None:
        """Decide the step; see `Decider`."""
        self._last = decide(step, means(parts), Rule(lambda d, delta: self.mode))


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield paused_over_learning for fp32 and bf16."""
    keep_freed_memory()  # the default in training
    for name, precision in zip(FIGURES, ("fp32", "bf16"), strict=True):
        say(f"paused against learning, {precision}")
        yield _measure(name, precision, *(1, 1, QUICK_BATCH) if quick else (7, 3, BATCH))


def _measure(name: str, precision: str, rounds: int, steps: int, batch: int) -> Figure:
    """steps: number of steps of each mode in a round; their median counts."""
    raw: dict[str, Any] = run_file(
        {"t": ("teacher", "wrn-16-2"), "s": ("student", "bench.simulated:SimulatedNetwork")},
        steps=1,
        batch=batch,
        compute={"precision": precision},
        **ONE_PROCESS,
    )
    no_time = {"seconds_per_sample_forward": 0.0, "seconds_per_sample_backward": 0.0}
    raw["networks"]["s"]["model_kwargs"] = no_time
    step = _step(raw)
    for mode in Mode:
        step(mode)
    pairs = [
        tuple(median(step(mode) for _ in range(steps)) for mode in (Mode.EXPERT, Mode.LEARNING))
        for _ in range(rounds)
    ]
    return Figure.of_pairs(
        name,
        [(a, b) for a, b in pairs],
        target=0.4 if precision == "fp32" else None,
        at_least=False,
        what=f"a WRN-16-2 teacher's step, paused over learning, {precision}, one process",
    )


def _step(raw: dict[str, Any]) -> Callable[[Mode], float]:
    """Function that runs one step with a given mode and returns its seconds."""
    config = configured(raw)
    decider = Forced(config, lambda decision: None)
    ours = InProcess(config, decider=decider)
    ((x, y),) = ours.batches(1)

    def step(mode: Mode) -> float:
        decider.mode = mode
        started = time.perf_counter()
        ours.step(x, y)
        return time.perf_counter() - started

    return step
