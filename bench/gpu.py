"""On a GPU: ours in one process against the plain loop, and where a step's time goes.

Ours is the step with its input and what a run counts of each, on a data set as CIFAR-100's, which
is held on the GPU; the plain loop has the same batches ready in memory. Neither is waited for but
at both ends of the steps that count.

What is fp32 to PyTorch has convolutions in TF32 on a GPU, on both sides.

Small networks keep a GPU waiting for the processor that launches their kernels one by one. CUDA
graphs, which are on by default, launch them together, and compiling joins some.

Not covered: several GPUs (`nccl.py`); the record of decisions.
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
"""Unequal, and the first large enough to keep a GPU busy."""


@dataclass(frozen=True)
class Case:
    """What is compared: ours, and the plain loop in fp32 unless `bf16`; the ratio to reach."""

    compute: Mapping[str, Any]
    bf16: bool = False
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
"""By figure: the trace's name, and ours."""

FIGURES = (*CASES, *TRACED, "gpu_ranks_over_one_process")
STEP, ALL = "bench: step", "bench: step and input"
"""What the traces call these."""
WAIT = re.compile(r"^cuda(\w*Synchronize|Memcpy)$")
"""Calls of CUDA's that return once the GPU is done with something."""
CALL = re.compile(r"^cu(da)?[A-Z]")


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give plain over ours in each configuration, and waits; nothing without a GPU."""
    if not torch.cuda.is_available():
        say("no GPU: nothing to measure")
        return ()
    steps, rounds = (20, 2) if quick else (100, 3)
    return figures(torch.device("cuda"), steps, rounds, say)


def figures(device: torch.device, steps: int, rounds: int, say: Say) -> Iterable[Figure]:
    """All figures, one by one, of `steps` steps each that count."""

    def base(networks: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
        return runs.run_file(networks, steps, **{**ONE_PROCESS, "device": device.type})

    def compared(name: str) -> Figure:
        case = CASES[name]
        what = f"plain loop ({'bf16' if case.bf16 else 'fp32'}) over ours, seconds per step, of "
        models = ", ".join(model for _, model in case.networks.values())
        sides = Compared({**base(case.networks), "compute": case.compute}, case.bf16, device, steps)
        return sides.figure(name, rounds, target=case.target, what=what + models)

    def traced(figure: str) -> Figure:
        name, compute = TRACED[figure]
        path = TRACES / f"gpu-trace-{name}"
        found = trace({**base(SMALL), "compute": compute}, device, path, 4)
        say(f"where a step's time goes, {name}: {path}.txt, and {path}.json.gz for a browser")
        return waits(figure, found, f"ours, {name}")

    return one_by_one(
        {
            **{name: partial(compared, name) for name in CASES},
            **{name: partial(traced, name) for name in TRACED},
            "gpu_ranks_over_one_process": partial(_ranks, base(SMALL), rounds),
        },
        say,
    )


def _ranks(base: Mapping[str, Any], rounds: int) -> Figure:
    """A rank per network on this GPU, over Gloo, against one process."""
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
    """The plain loop and ours, each from the first weights on the first batches, in turn."""

    def __init__(
        self, raw: Mapping[str, Any], bf16: bool, device: torch.device, steps: int
    ) -> None:
        """`steps` warm up, and as many count."""
        self._config, self._bf16, self._device, self._steps = configured(raw), bf16, device, steps
        self._images = in_memory(self._config, steps * self._config.data.batch_size)
        self._inputs = plain_inputs(raw, self._images)
        self.paused: dict[str, list[int]] = {"plain": [], "ours": []}
        """By side and round: teachers' steps that were paused, of all."""

    @cached_property
    def _made(self) -> tuple[InProcess, Mapping[str, Mapping[str, Any]]]:
        """Ours, compiled and recorded once for all rounds, and its first weights."""
        torch.compiler.reset()  # it would not compile as many networks as all figures have
        made = InProcess(self._config, self._device, self._images)
        return made, {li.name: copy.deepcopy(li.model.state_dict()) for li in made.learners}

    def figure(self, name: str, rounds: int, **more: Any) -> Figure:
        """Seconds per step of plain over those of ours."""
        pairs = alternate(rounds, self.plain, self.ours)
        details = {"paused": self.paused, "steps": 2 * self._steps}
        return Figure.of_pairs(name, pairs, details=details, **more)

    def plain(self) -> float:
        """Seconds per step."""
        found = plain.run(self._inputs, self._device, self._bf16, warm_up=self._steps)
        self.paused["plain"].append(sum(map(len, found.experts)))
        return mean(found.seconds[self._steps :])

    def ours(self) -> float:
        """Seconds per step."""
        with tf32(self._config.compute):
            made, weights = self._made
            for learner in made.learners:
                learner.model.load_state_dict(weights[learner.name])
                learner.optimizer.state.clear()
            paused = 0
            log = EpochLog(made.learners, made.place, made.decider, self._device)
            clock = plain.Clock(self._device, self._steps)
            for x, y in made.batches(2 * self._steps):
                result = made.step(x, y)
                log.add(result, len(y))
                paused += len(result.paused)
                clock.step()
            clock.stop()
        self.paused["ours"].append(paused)
        return mean(clock.seconds[self._steps :])


@dataclass(frozen=True)
class Traced:
    """What a trace says of waits: how often the processor stood still for the GPU, per step."""

    in_steps: float
    with_input: float
    calls: dict[str, int]
    """Of all, by name."""
    kernels: float = 0.0
    """That a GPU ran per step, with its copies."""
    kernel_ms: float = 0.0
    """What they took."""
    launches: float = 0.0
    """Calls of CUDA's per step, of any kind."""


def trace(raw: Mapping[str, Any], device: torch.device, path: Path, steps: int) -> Traced:
    """Trace `steps` steps of ours, after as many others.

    path: .txt becomes torch.profiler's table, .json.gz its trace, for chrome://tracing or Perfetto.
    RuntimeError if it has nothing of a GPU that was used.
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
        raise RuntimeError(f"the profiler has seen no call of CUDA's; {path}.txt has what it saw")
    every, on_gpu = calls_within(ALL, events), kernels_of(events)
    return Traced(
        in_steps=sum(calls_within(STEP, events).values()) / steps,
        with_input=sum(every.values()) / steps,
        calls=every,
        kernels=len(on_gpu) / steps,
        kernel_ms=sum(on_gpu) / steps,
        launches=sum(calls_within(ALL, events, CALL).values()) / steps,
    )


def kernels_of(events: Iterable[Any]) -> list[float]:
    """Milliseconds of each kernel and copy on a GPU; not of what the steps are called there."""
    marks = {STEP, ALL}
    return [
        event.time_range.elapsed_us() / 1000
        for event in events
        if event.device_type.name == "CUDA"
        and event.name not in marks
        and not getattr(event, "is_user_annotation", False)
    ]


def calls_within(
    name: str, events: Sequence[Any], pattern: re.Pattern[str] = WAIT
) -> dict[str, int]:
    """How often what matches was called, on any thread, while an event of that name went on.

    So the profiler's own waits, before and after, are left out.
    """
    on_host = [e for e in events if e.device_type.name == "CPU"]
    spans = [e.time_range for e in on_host if e.name == name]
    found: dict[str, int] = {}
    for event in on_host:
        begun = event.time_range.start
        if pattern.search(event.name) and any(s.start <= begun < s.end for s in spans):
            found[event.name] = found.get(event.name, 0) + 1
    return found


def waits(name: str, traced: Traced, whose: str) -> Figure:
    """Once for the distances is what a step needs; the input waits on a stream of its own."""
    return Figure(
        name,
        (traced.in_steps,),
        target=1.0,
        at_least=False,
        what=f"how often the processor waits for the GPU in a step, but for its input; {whose}",
        details={
            "per_step_with_input": traced.with_input,
            "calls": traced.calls,
            "kernels_per_step": traced.kernels,
            "kernel_ms_per_step": traced.kernel_ms,
            "cuda_calls_per_step": traced.launches,
        },
    )
