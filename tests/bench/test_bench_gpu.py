"""The benchmark for GPUs, run on a CPU.

Not covered: waits for a GPU.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu, in_process, plain, ranks, runs
from bench.figures import Figure, one_by_one


def test_a_clock_gives_each_step_the_mean_of_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 8.0, 9.0])  # as on a GPU: start, end of warm-up, end
    monkeypatch.setattr(plain, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    clock = plain.Clock(torch.device("cpu"), warm_up=2, by_step=False)
    for _ in range(6):
        clock.step()
    clock.stop()
    assert clock.seconds == [4.0, 4.0, 0.25, 0.25, 0.25, 0.25]


def test_a_clock_times_every_step_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 3.0])
    monkeypatch.setattr(plain, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    clock = plain.Clock(torch.device("cpu"), warm_up=2)
    clock.step()
    clock.step()
    clock.stop()
    assert clock.seconds == [1.0, 2.0]


SMALL = {
    "t1": ("teacher", "wrn-10-1"),
    "t2": ("teacher", "wrn-10-1"),
    "s": ("student", "wrn-10-1"),
}


def test_both_sides_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides start from the same weights and get the same batches."""
    precisions = iter(["highest", "highest"])
    monkeypatch.setattr(plain, "run", _checking_precision(plain.run, precisions))
    compute = {"precision": "tf32"}
    raw = runs.run_file(SMALL, 4, 16, compute=compute, **in_process.ONE_PROCESS)
    compared = gpu.Compared(raw, False, torch.device("cpu"), 4)
    figure = compared.figure("gpu_tf32", 2)
    assert len(figure.pairs) == 2
    assert all(seconds > 0 for pair in figure.pairs for seconds in pair)
    paused = figure.details["paused"]
    assert paused["plain"] == paused["ours"]
    assert min(paused["ours"]) > 0
    assert next(precisions, None) is None


def _checking_precision(run: Any, precisions: Iterator[str]) -> Any:
    """Wrap `run` so that it checks the matrix multiplication precision of the process."""

    def checked(*arguments: Any, **more: Any) -> plain.Trace:
        assert torch.get_float32_matmul_precision() == next(precisions)
        trace: plain.Trace = run(*arguments, **more)
        return trace

    return checked


def test_a_trace_has_its_steps_and_counts_waits_in_them(tmp_path: Path) -> None:
    raw = runs.run_file(SMALL, 2, 8, **in_process.ONE_PROCESS)
    traced = gpu.trace(raw, torch.device("cpu"), tmp_path / "trace", 2)
    assert traced == gpu.Traced(0.0, 0.0, {}), "a CPU waits for no GPU"
    assert gpu.STEP in (tmp_path / "trace.txt").read_text()
    with gzip.open(tmp_path / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [e for e in events if e.get("name") == gpu.STEP]
    assert len(steps) == 2
    figure = gpu.waits("gpu_waits_per_step", gpu.Traced(1.0, 7.0, {}), "ours")
    assert figure.reached


@pytest.mark.timeout(180)
def test_all_figures_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code as on a GPU, with smaller networks and fewer cases."""
    assert [case.target for case in gpu.CASES.values()][:2] == [2.0, 4.0]
    two = {name: SMALL[name] for name in ("t1", "s")}
    monkeypatch.setattr(gpu, "SMALL", two)
    cases = {"gpu_fp32": gpu.Case(gpu.FP32, target=2.0), "gpu_bf16": gpu.Case(gpu.BF16, bf16=True)}
    monkeypatch.setattr(gpu, "CASES", cases)
    monkeypatch.setattr(gpu, "TRACED", {"gpu_waits_per_step": ("fp32", gpu.FP32)})
    monkeypatch.setattr(gpu, "TRACES", tmp_path)
    monkeypatch.setattr(runs, "train", ranks.train)  # forked, in half the CPU time
    monkeypatch.setattr(runs, "run_file", partial(runs.run_file, batch=runs.QUICK_BATCH))
    said: list[str] = []
    by_name = {f.name: f for f in gpu.figures(torch.device("cpu"), 2, 1, said.append)}
    assert set(by_name) == {*cases, "gpu_waits_per_step", "gpu_ranks_over_one_process"}
    assert said == [*by_name][:3] + said[3:4] + [*by_name][3:], "nothing went wrong"
    assert all(a > 0 and b > 0 for f in by_name.values() for a, b in f.pairs)
    assert "(bf16) over ours, seconds per step, of wrn-10-1, wrn-10-1" in by_name["gpu_bf16"].what
    assert (tmp_path / "gpu-trace-fp32.txt").exists()


def test_kernels_are_distinguished_from_annotations() -> None:
    def event(name: str, device: str, us: float, is_mark: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            device_type=SimpleNamespace(name=device),
            time_range=SimpleNamespace(elapsed_us=lambda: us),
            is_user_annotation=is_mark,
        )

    events = [
        event("wgrad", "CUDA", 500.0),
        event("Memcpy DtoD", "CUDA", 2.0),
        event("_Replayed", "CUDA", 700.0, is_mark=True),
        event(gpu.STEP, "CUDA", 900.0),
        event("aten::conv2d", "CPU", 40.0),
    ]
    assert gpu.kernels_of(events) == [0.5, 0.002]


def test_calls_are_counted_within_steps() -> None:
    names = {
        gpu.STEP: [(10, 20), (30, 40)],
        "cudaStreamSynchronize": [(5, 6), (12, 15), (19, 25), (31, 32)],
        "cudaDeviceSynchronize": [(35, 36), (50, 60)],
        "cudaMemcpyAsync": [(13, 14)],
        "cudaMemcpy": [(14, 15)],
    }
    host, device = SimpleNamespace(name="CPU"), SimpleNamespace(name="CUDA")
    events = [
        SimpleNamespace(name=n, device_type=host, time_range=SimpleNamespace(start=a, end=b))
        for n, spans in names.items()
        for a, b in spans
    ]
    whole = SimpleNamespace(start=0, end=99)
    events.append(SimpleNamespace(name=gpu.STEP, device_type=device, time_range=whole))
    calls = gpu.calls_within(gpu.STEP, events)
    assert calls == {"cudaStreamSynchronize": 3, "cudaDeviceSynchronize": 1, "cudaMemcpy": 1}


def test_a_failed_figure_does_not_stop_the_others() -> None:
    said: list[str] = []

    def broken() -> Figure:
        raise ValueError("no such kernel")

    figures = one_by_one(
        {"a": lambda: Figure("a", (1.0,)), "b": broken, "c": lambda: Figure("c", (2.0,))},
        said.append,
    )
    names: list[str] = []
    with pytest.raises(RuntimeError, match=r"^could not be measured: b$"):
        names.extend(f.name for f in figures)
    assert names == ["a", "c"]
    assert any("no such kernel" in line for line in said)
