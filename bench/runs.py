"""Runs of `switokd train`, and their speed from the files of the run folder.

The first epoch warms up. The rates of the other epochs come from metrics.jsonl, so that start,
evaluation and closing report do not count.

Not covered: failed runs, whose output is in the error message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.machine import REPOSITORY

BATCH, CLASSES = 64, 100
QUICK_BATCH = 8
"""Batch size with --quick."""
LEARNING_RATES = {"teacher": 0.1, "student": 0.01}
"""Students learn slowly, so that teachers get ahead and pause."""


@dataclass(frozen=True)
class RunResult:
    """Results of one run, from its folder."""

    step_seconds: float
    """Mean seconds per step, without the first epoch, on the slowest rank."""
    paused: float
    """Share of the teachers' steps that were paused."""
    warm_up: int
    """Steps of the first epoch."""
    experts: tuple[frozenset[str], ...]
    """Teachers in expert mode with all their students, by step."""
    summary: Mapping[str, Any]
    """Content of summary.json."""


def run_file(
    networks: Mapping[str, tuple[str, str]], steps: int, batch: int = BATCH, **more: Any
) -> dict[str, Any]:
    """Run file with two epochs of `steps` steps on images of noise.

    networks: (role, model) by name. more: further settings.
    """
    return {
        "name": "bench",
        "device": "cpu",
        "data": {
            "dataset": "bench.images:NoiseImages",
            "batch_size": batch,
            "kwargs": {"samples": steps * batch, "classes": CLASSES},
        },
        "networks": {
            name: {"role": role, "model": model, "optimizer": {"lr": LEARNING_RATES[role]}}
            for name, (role, model) in networks.items()
        },
        "schedule": {"epochs": 2},
        **more,
    }


def read(folder: Path) -> RunResult:
    """Read the results of a finished run from its folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    networks = summary["networks"].values()
    first = lines[0]["network"]
    epochs = [line for line in lines if line["network"] == first]
    batch = next(iter(networks))["samples"] / epochs[-1]["step"]
    rates = [line["samples_per_second"] for line in epochs]
    counted = rates[1:] or rates
    teachers = [network for network in networks if network["role"] == "teacher"]
    return RunResult(
        step_seconds=batch * sum(1 / rate for rate in counted) / len(counted),
        paused=sum(t["steps_paused"] for t in teachers) / sum(t["steps"] for t in teachers),
        warm_up=epochs[0]["step"],
        experts=_experts(folder),
        summary=summary,
    )


def _experts(folder: Path) -> tuple[frozenset[str], ...]:
    modes: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in (folder / "decisions.jsonl").read_text().splitlines():
        pair = json.loads(line)
        modes[pair["step"]][pair["teacher"]].add(pair["mode"])
    return tuple(
        frozenset(teacher for teacher, of_pairs in modes[step].items() if of_pairs == {"expert"})
        for step in sorted(modes)
    )


def train(
    config: Mapping[str, Any], processes: int | None = None, seconds: float = 600
) -> RunResult:
    """Train a run file with `switokd train`. RuntimeError with the output if that fails."""
    more = ["--processes", str(processes)] if processes else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump({**config, "run_dir": f"{folder}/out"}, sort_keys=False))
        command = [sys.executable, "-m", "switokd", "train", str(path), *more]
        output(command, seconds)
        return read(Path(folder) / "out")


def environment() -> dict[str, str]:
    """Return this process's environment without a number of threads."""
    return {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}


def output(command: Sequence[str], seconds: float) -> str:
    """Run a command without OMP_NUM_THREADS and return its standard output.

    RuntimeError with the output if the command fails.
    """
    done = subprocess.run(
        list(command),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout
