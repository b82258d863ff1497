"""Where the time of a step goes, and what keeping freed memory saves: WRN-16-2, batch 64, fp32.

    python -m bench.profiling SIDE KEEP STEPS PROFILE    # compiled, eager or plain; 0/1; n; 0/1

A teacher and a student, both of which learn in every step (`dml`), in one process with all cores.
Each measurement has a process of its own: what the allocator does with freed memory is set for a
process's whole life.

Shares are of the profiled step, by torch.profiler. All sides give freed memory back to the system
then, as ours do not by default: what the profiler notes comes to lie within memory that is kept,
which is then not found for the next step, and that adds a sixth to a step and more. Time belongs to
what it was spent for: that of allocating a convolution's result to the convolution.

Not covered: what the profiler itself costs (`unprofiled_ms` stands beside it); GPUs (`gpu.py`).
Additions of losses count as the networks', and are next to nothing.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from bench import plain, runs
from bench.against import EQUAL, plain_inputs
from bench.figures import Figure, Say, alternate
from bench.in_process import ONE_PROCESS, InProcess, configured
from switokd.runtime.allocator import keep_freed_memory

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
"""In the name of what torch.compile makes. It makes no convolutions, but names their gradients."""
FIGURES = (
    *(f"step_share_{kind}_{side}" for side in SIDES for kind in KINDS),
    *(f"memory_kept_over_returned_{side}" for side in SIDES[:-1]),
)
NO_NETWORK = re.compile("Optimizer\\.|AccumulateGrad")
"""What is called from these is no network's forward or backward."""


@dataclass(frozen=True)
class Measured:
    """What one process found."""

    seconds: float
    """Of a step, without the profiler."""
    profiled_seconds: float
    """Of a step, with it; 0 if there was none."""
    by_kind: dict[str, float]
    """Seconds of that, by kind."""


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give the shares of a step, and memory kept over memory given back."""
    rounds, steps = (1, 2) if quick else (2, 5)
    sides = SIDES[1:] if quick else SIDES  # compiling takes a minute the first time
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    for i in range(rounds):
        for side in sides:
            say(f"where a step's time goes: {side}, round {i + 1} of {rounds}")
            found[side].append(_start(side, False, steps, with_profiler=True))
    yield from _shares(found)
    for side in sides[:-1]:
        say(f"memory kept against memory given back: {side}")
        yield _kept_over_returned(side, 1 if quick else 3, steps)


def _shares(found: dict[str, list[Measured]]) -> Iterable[Figure]:
    """A figure for each side and kind; the first has a table of all."""
    rows = [
        {
            "side": side,
            **{f"{kind}_ms": 1000 * median(m.by_kind[kind] for m in each) for kind in KINDS},
            "profiled_ms": 1000 * median(m.profiled_seconds for m in each),
            "unprofiled_ms": 1000 * median(m.seconds for m in each),
        }
        for side, each in found.items()
    ]
    details: dict[str, Any] = {"rows": rows}
    for side, each in found.items():
        whose = "the plain loop's step" if side == "plain" else f"our step, {side}"
        for kind, words in KINDS.items():
            yield Figure.of_pairs(
                f"step_share_{kind}_{side}",
                [(m.by_kind[kind], m.profiled_seconds) for m in each],
                what=f"share of {whose}, that is {words}; WRN-16-2, two networks",
                details=details,
            )
            details = {}


def _kept_over_returned(side: str, rounds: int, steps: int) -> Figure:
    def seconds(keep: bool) -> float:
        return _start(side, keep, steps).seconds

    return Figure.of_pairs(
        f"memory_kept_over_returned_{side}",
        alternate(rounds, partial(seconds, True), partial(seconds, False)),
        at_least=False,
        what=f"our step, {side}, with compute.keep_memory over without it",
    )


def _start(side: str, keep: bool, steps: int, with_profiler: bool = False) -> Measured:
    """Measure in a new process."""
    flags = [str(int(keep)), str(steps), str(int(with_profiler))]
    command = [sys.executable, "-m", "bench.profiling", side, *flags]
    return Measured(**json.loads(runs.output(command, seconds=600).splitlines()[-1]))


def run(side: str, keep: bool, steps: int, with_profiler: bool) -> Measured:
    """Measure in this process, after as many steps that do not count."""
    if keep:
        keep_freed_memory()
    some_steps = _side(side, steps, with_profiler)
    some_steps()
    seconds = _seconds(some_steps) / steps
    if not with_profiler:
        return Measured(seconds, 0.0, {})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        profiled = _seconds(some_steps) / steps
    by_kind = dict.fromkeys(KINDS, 0.0)
    for event in profiler.events():
        by_kind[kind_of(_chain(event))] += event.self_cpu_time_total / 1e6 / steps
    by_kind["rest"] = profiled - by_kind["convolutions"] - by_kind["normalisation"]  # Python's too
    return Measured(seconds, profiled, by_kind)


def _side(side: str, steps: int, with_profiler: bool) -> Callable[[], None]:
    """Give what does `steps` steps of one side, always on the same batches."""
    if with_profiler:  # the kernels that are compiled say their names
        torch._inductor.config.cpp.enable_kernel_profile = True
    raw = runs.run_file(
        EQUAL["1T1S"],
        steps,
        distillation={"strategy": "dml"},
        compute={"compile": side == "compiled"},
        **ONE_PROCESS,
    )
    return _plain(raw, steps) if side == "plain" else _ours(raw, steps)


def _plain(raw: Mapping[str, Any], steps: int) -> Callable[[], None]:
    inputs = plain_inputs(raw)
    loop, batches = plain.loop(inputs, torch.device("cpu")), inputs["batches"][:steps]

    def some_steps() -> None:
        loop(batches)

    return some_steps


def _ours(raw: Mapping[str, Any], steps: int) -> Callable[[], None]:
    ours = InProcess(configured(raw))
    batches = list(ours.batches(steps))

    def some_steps() -> None:
        for x, y in batches:
            ours.step(x, y)

    return some_steps


def kind_of(names: Iterable[str]) -> str:
    """What an operation is for: its own name, then the names of those that it was called from."""
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


if __name__ == "__main__":
    flags = [int(text) for text in sys.argv[2:]]
    print(json.dumps(asdict(run(sys.argv[1], bool(flags[0]), flags[1], bool(flags[2])))))
