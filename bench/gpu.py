"""On one GPU: switokd in one process against the plain loop, and the parts of a step's time.

Our side is the step with its input and its metrics, on a data set like CIFAR-100 that stays on the
GPU. The plain loop has the same batches in memory. The host waits for the GPU only before the first
and after the last measured step.

PyTorch's fp32 uses TF32 for convolutions on a GPU, on both sides.

With small networks, a GPU waits for the CPU to launch kernels one by one. CUDA graphs, which are on
by default, launch all kernels of a graph at once; compiling fuses some kernels.

Not covered: several GPUs (`nccl.py`); the decision log.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench import plain, runs
from bench.against import EQUAL, plain_inputs
from bench.figures import Figure, Say, alternate, one_by_one
from bench.in_process import ONE_PROCESS, InProcess, configured, in_memory
from switokd.training.build import tf32
from switokd.training.meters import EpochLog

TRACES = Path(__file__).parent
FP32, BF16 = {"precision": "fp32"}, {"precision": "bf16"}
COMPILED, EAGER = {"compile": True}, {"cuda_graphs": False}
SMALL = EQUAL["2T1S"]
PAPERS = {
    "t1": ("teacher", "wrn-16-10"),
    "t2": ("teacher", "wrn-16-2"),
    "s": ("student", "mobilenet"),
}
"""Unequal networks; the first one is large enough to keep a GPU busy."""


@dataclass(frozen=True)
class Case:
    """One comparison of our side with the plain loop."""

    compute: Mapping[str, Any]
    """Compute settings of our side."""
    bf16: bool = False
    """Whether the plain loop uses bf16 instead of fp32."""
    target: float | None = None
    networks: Mapping[str, tuple[str, str]] = field(default_factory=lambda: SMALL)


CASES = {
    "gpu_fp32": Case(FP32, target=2.0),
    "gpu_bf16_compiled": Case(BF16 | COMPILED, target=4.0),
    "gpu_unequal_fp32": Case(FP32, networks=PAPERS),
    "gpu_unequal_bf16_compiled": Case(BF16 | COMPILED, networks=PAPERS),
    "gpu_tf32_compiled": Case({"precision": "tf32"} | COMPILED),
    "gpu_bf16": Case(BF16),
    "gpu_bf16_compiled_over_bf16": Case(BF16 | COMPILED, bf16=True),
    "gpu_fp32_without_graphs": Case(FP32 | EAGER),
    "gpu_bf16_compiled_without_graphs": Case(BF16 | COMPILED | EAGER),
}
TRACED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpu_waits_per_step": ("fp32", FP32),
    "gpu_waits_per_step_bf16_compiled": ("bf16-compiled", BF16 | COMPILED),
    "gpu_waits_per_step_without_graphs": ("without-graphs", FP32 | EAGER),
}
"""By figure: name of the trace, and compute settings of our side."""

FIGURES = (*CASES, *TRACED, "gpu_ranks_over_one_process")
STEP, ALL = "bench: step", "bench: step and input"
"""Names of these sections in the traces."""
WAIT = re.compile(r"^cuda(\w*Synchronize|Memcpy)$")
"""CUDA calls that wait for the GPU."""
CALL = re.compile(r"^cu(da)?[A-Z]")
"""All CUDA calls."""


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield plain over ours for each configuration, and waits per step; nothing without a GPU."""
    if not torch.cuda.is_available():
        say("no GPU: nothing to measure")
        return ()
    steps, rounds = (20, 2) if quick else (100, 3)
    return figures(torch.device("cuda"), steps, rounds, say)


def figures(device: torch.device, steps: int, rounds: int, say: Say) -> Iterable[Figure]:
    """Yield all figures, with `steps` measured steps each."""

    def base(networks: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
        return runs.run_file(networks, steps, **{**ONE_PROCESS, "device": device.type})

    def compared(name: str) -> Figure:
        case = CASES[name]
        what = f"plain loop ({'bf16' if case.bf16 else 'fp32'}) over ours, seconds per step, of "
        models = ", ".join(model for _, model in case.networks.values())
        sides = Compared({**base(case.networks), "compute": case.compute}, case.bf16, device, steps)
        return sides.figure(name, rounds, target=case.target, what=what + models)

    def traced_figure(figure: str) -> Figure:
        name, compute = TRACED[figure]
        path = TRACES / f"gpu-trace-{name}"
        traced = trace({**base(SMALL), "compute": compute}, device, path, 4)
        say(f"trace of a step, {name}: {path}.txt, and {path}.json.gz for a browser")
        return waits(figure, traced, f"ours, {name}")

    return one_by_one(
        {
            **{name: partial(compared, name) for name in CASES},
            **{name: partial(traced_figure, name) for name in TRACED},
            "gpu_ranks_over_one_process": partial(_ranks, base(SMALL), rounds),
        },
        say,
    )


def _ranks(base: Mapping[str, Any], rounds: int) -> Figure:
    """One rank per network on this GPU, over Gloo, against a single process."""
    shared = {**base, "placement": "dedicated", "coordinator": {"address": "auto"}}
    return Figure.of_pairs(
        "gpu_ranks_over_one_process",
        alternate(
            rounds,
            lambda: runs.train(shared, len(base["networks"])).step_seconds,
            lambda: runs.train(base, 1).step_seconds,
        ),
        what="seconds per step of three ranks that share one GPU, over one process's, fp32",
    )


class Compared:
    """The plain loop and our side, measured alternately from the same weights and batches."""

    def __init__(
        self, raw: Mapping[str, Any], bf16: bool, device: torch.device, steps: int
    ) -> None:
        """raw: run file. bf16: precision of the plain loop. steps: to warm up, and to measure."""
        self._config, self._bf16, self._device, self._steps = configured(raw), bf16, device, steps
        self._images = in_memory(self._config, steps * self._config.data.batch_size)
        self._inputs = plain_inputs(raw, self._images)
        self.paused: dict[str, list[int]] = {"plain": [], "ours": []}
        """Number of paused teacher steps, by side and round."""

    @cached_property
    def _ours(self) -> tuple[InProcess, Mapping[str, Mapping[str, Any]]]:
        """Our side, compiled and captured once for all rounds, and its initial weights."""
        torch.compiler.reset()  # all figures together have more networks than its limit
        ours = InProcess(self._config, self._device, self._images)
        return ours, {li.name: copy.deepcopy(li.model.state_dict()) for li in ours.learners}

    def figure(self, name: str, rounds: int, **more: Any) -> Figure:
        """Seconds per step of the plain loop over seconds per step of our side."""
        pairs = alternate(rounds, self.plain, self.ours)
        details = {"paused": self.paused, "steps": 2 * self._steps}
        return Figure.of_pairs(name, pairs, details=details, **more)

    def plain(self) -> float:
        """Seconds per step of the plain loop."""
        trace = plain.run(self._inputs, self._device, self._bf16, warm_up=self._steps)
        self.paused["plain"].append(sum(map(len, trace.experts)))
        return mean(trace.seconds[self._steps :])

    def ours(self) -> float:
        """Seconds per step of our side."""
        with tf32(self._config.compute):
            ours, weights = self._ours
            for learner in ours.learners:
                learner.model.load_state_dict(weights[learner.name])
                learner.optimizer.state.clear()
            paused = 0
            log = EpochLog(ours.learners, ours.placement, ours.decider, self._device)
            clock = plain.Clock(self._device, self._steps)
            for x, y in ours.batches(2 * self._steps):
                result = ours.step(x, y)
                log.add(result, len(y))
                paused += len(result.paused)
                clock.step()
            clock.stop()
        self.paused["ours"].append(paused)
        return mean(clock.seconds[self._steps :])


@dataclass(frozen=True)
class Traced:
    """Content of a trace: how often the CPU waits for the GPU, and the work of the GPU."""

    in_steps: float
    """Waits per step."""
    with_input: float
    """Waits per step and its input."""
    calls: dict[str, int]
    """Number of waits in all steps, by the name of the CUDA call."""
    kernels: float = 0.0
    """Kernels and copies on the GPU per step."""
    kernel_ms: float = 0.0
    """Milliseconds of all kernels and copies per step."""
    launches: float = 0.0
    """CUDA calls per step."""


def trace(raw: Mapping[str, Any], device: torch.device, path: Path, steps: int) -> Traced:
    """Trace `steps` steps of our side, after the same number of steps to warm up.

    path: PATH.txt gets the profiler's table, PATH.json.gz the trace for chrome://tracing or
    Perfetto. RuntimeError if the trace of a GPU contains no CUDA calls.
    """
    config = configured(raw)
    torch.compiler.reset()
    images = in_memory(config, 2 * steps * config.data.batch_size)
    ours = InProcess(config, device, images)
    batches = ours.batches(2 * steps)
    for x, y in islice(batches, steps):
        ours.step(x, y)
    plain.wait_for(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler, record_function(ALL):
        for x, y in batches:
            with record_function(STEP):
                ours.step(x, y)
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=30)
    path.with_suffix(".txt").write_text(table)
    profiler.export_chrome_trace(str(path.with_suffix(".json.gz")))
    events = profiler.events() or []
    if device.type == "cuda" and not calls_within(ALL, events, CALL):
        raise RuntimeError(f"the profiler has recorded no CUDA calls; see {path}.txt")
    all_waits, on_gpu = calls_within(ALL, events), kernels_of(events)
    return Traced(
        in_steps=sum(calls_within(STEP, events).values()) / steps,
        with_input=sum(all_waits.values()) / steps,
        calls=all_waits,
        kernels=len(on_gpu) / steps,
        kernel_ms=sum(on_gpu) / steps,
        launches=sum(calls_within(ALL, events, CALL).values()) / steps,
    )


def kernels_of(events: Iterable[Any]) -> list[float]:
    """Milliseconds of each kernel and copy on a GPU, without the named sections."""
    sections = {STEP, ALL}
    return [
        event.time_range.elapsed_us() / 1000
        for event in events
        if event.device_type.name == "CUDA"
        and event.name not in sections
        and not getattr(event, "is_user_annotation", False)
    ]


def calls_within(
    name: str, events: Sequence[Any], pattern: re.Pattern[str] = WAIT
) -> dict[str, int]:
    """Number of calls that match `pattern`, on any thread, during events named `name`.

    The profiler's own waits, before and after these events, do not count.
    """
    on_host = [e for e in events if e.device_type.name == "CPU"]
    spans = [e.time_range for e in on_host if e.name == name]
    calls: dict[str, int] = {}
    for event in on_host:
        start = event.time_range.start
        if pattern.search(event.name) and any(s.start <= start < s.end for s in spans):
            calls[event.name] = calls.get(event.name, 0) + 1
    return calls


def waits(name: str, traced: Traced, side: str) -> Figure:
    """Figure of the waits per step. A step needs one wait, for its distances."""
    return Figure(
        name,
        (traced.in_steps,),
        target=1.0,
        at_least=False,
        what=f"how often the CPU waits for the GPU in a step, without its input; {side}",
        details={
            "per_step_with_input": traced.with_input,
            "calls": traced.calls,
            "kernels_per_step": traced.kernels,
            "kernel_ms_per_step": traced.kernel_ms,
            "cuda_calls_per_step": traced.launches,
        },
    )
