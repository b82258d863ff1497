"""On a GPU: ours in one process against the plain loop, and where a step's time goes.

What is fp32 to PyTorch has convolutions in TF32 on a GPU, on both sides.

Small networks keep a GPU waiting for the processor that launches their kernels; compiling makes
fewer of them, hence the target in fp32-class precision is for tf32, compiled.

Not covered: several GPUs (`nccl.py`). It has never run where it was written, without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench import plain, runs
from bench.against import EQUAL, plain_inputs
from bench.figures import Figure, Say, alternate
from bench.in_process import ONE_PROCESS, InProcess, configured

DEVICE = "cuda"
TRACES = Path(__file__).parent
TF32_COMPILED = {"precision": "tf32", "compile": True}
BF16_COMPILED = {"precision": "bf16", "compile": True}
CONFIGURATIONS: dict[str, tuple[dict[str, Any], bool, float | None]] = {
    "gpu_fp32": ({"precision": "fp32"}, False, None),
    "gpu_tf32": ({"precision": "tf32"}, False, None),
    "gpu_tf32_compiled": (TF32_COMPILED, False, 2.0),
    "gpu_bf16": ({"precision": "bf16"}, True, None),
    "gpu_bf16_compiled": (BF16_COMPILED, False, 4.0),
    "gpu_bf16_compiled_over_bf16": (BF16_COMPILED, True, None),
}
"""Ours, whether the plain side is in bf16 as well (else in fp32), and the ratio to reach."""

TRACED: dict[str, dict[str, Any]] = {"eager": {"precision": "fp32"}, "compiled": BF16_COMPILED}
FIGURES = (*CONFIGURATIONS, "gpu_ranks_over_one_process")


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give plain over ours in each configuration; nothing without a GPU."""
    if not torch.cuda.is_available():
        say("no GPU: nothing to measure")
        return
    steps, rounds = (20, 2) if quick else (100, 3)
    base = runs.run_file(EQUAL["2T1S"], steps, **{**ONE_PROCESS, "device": DEVICE})
    inputs = plain_inputs(base)
    for name, (compute, bf16, target) in CONFIGURATIONS.items():
        say(f"GPU: {name}")
        config = {**base, "compute": compute}

        def theirs(bf16: bool = bf16) -> float:
            return mean(plain.run(inputs, torch.device(DEVICE), bf16).seconds[steps:])

        def ours(config: dict[str, Any] = config) -> float:
            return runs.train(config, 1).step_seconds

        what = f"plain loop ({'bf16' if bf16 else 'fp32'}) over ours, seconds per step"
        yield Figure.of_pairs(name, alternate(rounds, theirs, ours), target=target, what=what)
    say("a rank per network on this GPU, over Gloo, against one process")
    shared = {**base, "placement": "dedicated", "coordinator": {"address": "auto"}}
    yield Figure.of_pairs(
        "gpu_ranks_over_one_process",
        alternate(
            rounds,
            lambda: runs.train(shared, len(EQUAL["2T1S"])).step_seconds,
            lambda: runs.train(base, 1).step_seconds,
        ),
        what="seconds per step of three ranks that share one GPU, over one process's, fp32",
    )
    for name, compute in () if quick else TRACED.items():
        path = TRACES / f"gpu-trace-{name}.txt"
        path.write_text(trace({**base, "compute": compute}))
        say(f"where a step's time goes, {name}: {path}")


def trace(config: dict[str, Any]) -> str:
    """torch.profiler's table of ten steps of ours."""
    ours = InProcess(configured(config), torch.device(DEVICE))
    batches = ours.batches(20)

    def ten_steps() -> None:
        for x, y in islice(batches, 10):
            ours.step(x, y)

    ten_steps()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        ten_steps()
        torch.cuda.synchronize()
    table: str = profiler.key_averages().table(sort_by="device_time_total", row_limit=30)
    return table
