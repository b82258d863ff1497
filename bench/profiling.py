"""Parts of a step's time, and the effect of keeping freed memory: WRN-16-2, batch 64, fp32.

A teacher and a student learn in every step (`dml`), in one process with all cores. Each measurement
has a process of its own, because the allocator's settings hold for the whole life of a process.

The shares come from torch.profiler. While it runs, all sides return freed memory to the system,
unlike switokd's default. The profiler's own allocations would otherwise split the kept memory, and
a step would take a sixth longer or more. The time for allocating the result of an operation counts
as time of this operation.

Not covered: overhead of the profiler (`unprofiled_ms` shows the time without it); GPUs (`gpu.py`).
The additions of losses count as additions in networks; they take almost no time.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from bench import plain, ranks, runs
from bench.against import EQUAL, plain_inputs
from bench.figures import Figure, Say, alternate
from bench.in_process import ONE_PROCESS, InProcess, configured
from switokd.runtime.allocator import keep_freed_memory
from switokd.runtime.environment import cores

SIDES = ("compiled", "eager", "plain")
KINDS = {
    "convolutions": "convolutions",
    "normalisation": "BatchNorm, ReLU, addition",
    "rest": "everything else",
}
CONVOLUTION = re.compile("convolution|conv2d", re.IGNORECASE)
NORMALISATION = re.compile(
    "batch_?norm|relu|threshold_backward|clamp_min|aten::add_?$|_add_|AddBackward", re.IGNORECASE
)
FUSED = "_cpp_fused_"
"""Part of the names of compiled kernels. Names may mention convolutions, but contain none."""
FIGURES = (
    *(f"step_share_{kind}_{side}" for side in SIDES for kind in KINDS),
    *(f"memory_kept_over_returned_{side}" for side in SIDES[:-1]),
)
NO_NETWORK = re.compile("Optimizer\\.|AccumulateGrad")
"""Operations called from these are not part of a network's forward or backward pass."""


@dataclass(frozen=True)
class Extent:
    """How much is measured: number of steps, and size of their batches."""

    steps: int = 5
    batch: int = runs.BATCH


@dataclass(frozen=True)
class Measured:
    """Measurements of one process."""

    seconds: float
    """Seconds per step without the profiler."""
    profiled_seconds: float
    """Seconds per step with the profiler; 0 if it was not used."""
    by_kind: dict[str, float]
    """Seconds of a profiled step, by kind of operation."""


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield the shares of a step, and kept over returned memory."""
    rounds, extent = (1, Extent(1, runs.QUICK_BATCH)) if quick else (2, Extent())
    sides = SIDES[1:] if quick else SIDES  # compiling takes a minute the first time
    measured: dict[str, list[Measured]] = {side: [] for side in sides}
    for i in range(rounds):
        for side in sides:
            say(f"parts of a step's time: {side}, round {i + 1} of {rounds}")
            measured[side].append(_start(side, False, extent, with_profiler=True))
    yield from _shares(measured)
    for side in sides[:-1]:
        say(f"kept against returned memory: {side}")
        yield _kept_over_returned(side, 1 if quick else 3, extent)


def _shares(measured: dict[str, list[Measured]]) -> Iterable[Figure]:
    """Yield one figure per side and kind; the first one has a table of all."""
    rows = [
        {
            "side": side,
            **{f"{kind}_ms": 1000 * median(m.by_kind[kind] for m in rounds) for kind in KINDS},
            "profiled_ms": 1000 * median(m.profiled_seconds for m in rounds),
            "unprofiled_ms": 1000 * median(m.seconds for m in rounds),
        }
        for side, rounds in measured.items()
    ]
    details: dict[str, Any] = {"rows": rows}
    for side, rounds in measured.items():
        step = "the plain loop's step" if side == "plain" else f"our step ({side})"
        for kind, operations in KINDS.items():
            yield Figure.of_pairs(
                f"step_share_{kind}_{side}",
                [(m.by_kind[kind], m.profiled_seconds) for m in rounds],
                what=f"share of {operations} in {step}; two WRN-16-2",
                details=details,
            )
            details = {}


def _kept_over_returned(side: str, rounds: int, extent: Extent) -> Figure:
    def seconds(keep: bool) -> float:
        return _start(side, keep, extent).seconds

    return Figure.of_pairs(
        f"memory_kept_over_returned_{side}",
        alternate(rounds, partial(seconds, True), partial(seconds, False)),
        at_least=False,
        what=f"our step, {side}, with compute.keep_memory over without it",
    )


def _start(side: str, keep: bool, extent: Extent, with_profiler: bool = False) -> Measured:
    """Call `run` in a new process, forked from one that has imported PyTorch but used nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ranks.PRELOADED)
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(run, side, keep, extent, with_profiler).result(timeout=600)


def run(side: str, keep: bool, extent: Extent, with_profiler: bool) -> Measured:
    """Measure some steps in this process, after the same number of steps to warm up."""
    torch.set_num_threads(cores())  # independent of OMP_NUM_THREADS
    steps = extent.steps
    if keep:
        keep_freed_memory()
    train_steps = _side(side, extent, with_profiler)
    train_steps()
    seconds = _seconds(train_steps) / steps
    if not with_profiler:
        return Measured(seconds, 0.0, {})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        profiled = _seconds(train_steps) / steps
    by_kind = dict.fromkeys(KINDS, 0.0)
    for event in profiler.events():
        by_kind[kind_of(_chain(event))] += event.self_cpu_time_total / 1e6 / steps
    by_kind["rest"] = (
        profiled - by_kind["convolutions"] - by_kind["normalisation"]
    )  # includes Python
    return Measured(seconds, profiled, by_kind)


def _side(side: str, extent: Extent, with_profiler: bool) -> Callable[[], None]:
    """Function that trains some steps of one side, always on the same batches."""
    if with_profiler:  # so that compiled kernels have names in the profile
        torch._inductor.config.cpp.enable_kernel_profile = True
    raw = runs.run_file(
        EQUAL["1T1S"],
        extent.steps,
        extent.batch,
        distillation={"strategy": "dml"},
        compute={"compile": side == "compiled"},
        **ONE_PROCESS,
    )
    return (_plain if side == "plain" else _ours)(raw, extent.steps)


def _plain(raw: Mapping[str, Any], steps: int) -> Callable[[], None]:
    inputs = plain_inputs(raw)
    loop, batches = plain.loop(inputs, torch.device("cpu")), inputs["batches"][:steps]

    def train_steps() -> None:
        loop(batches)

    return train_steps


def _ours(raw: Mapping[str, Any], steps: int) -> Callable[[], None]:
    ours = InProcess(configured(raw))
    batches = list(ours.batches(steps))

    def train_steps() -> None:
        for x, y in batches:
            ours.step(x, y)

    return train_steps


def kind_of(names: Iterable[str]) -> str:
    """Kind of an operation, from its name and the names of its callers, innermost first."""
    names = list(names)
    if any(NO_NETWORK.search(name) for name in names):
        return "rest"
    for name in names:
        if FUSED not in name and CONVOLUTION.search(name):
            return "convolutions"
        if NORMALISATION.search(name):
            return "normalisation"
    return "rest"


def _chain(event: Any) -> Iterable[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def _seconds(steps: Callable[[], None]) -> float:
    started = time.perf_counter()
    steps()
    return time.perf_counter() - started
