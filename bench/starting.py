"""Time to the first step and memory of a run: `switokd train` over torchrun with the same recipe.

Both sides train digits-2t1s for one epoch, in turn; with --quick, two steps of digits-1t1s. The
first step ends when the first line is in decisions.jsonl. Memory is the peak of the proportional
set sizes (PSS) of all processes of the run: a page that several processes share counts once.

The last figure is the time of a restart: from the death of a rank to the first decision of the new
ranks, with checkpoints every 20 steps, and without any import.

Not covered: GPUs; several machines; a cold file cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.figures import Figure, Say, alternate
from bench.machine import REPOSITORY
from bench.runs import environment

FIGURES = ("time_to_first_step", "memory_of_a_run", "restart_seconds")
RECIPE = ("digits-2t1s", "schedule.epochs=1")
QUICK_RECIPE = ("digits-1t1s", "schedule.max_steps=2")
POLL_SECONDS = 0.05


def commands(quick: bool) -> dict[str, list[str]]:
    """The commands of both sides, in the order of the ratio."""
    recipe, processes = (QUICK_RECIPE, 2) if quick else (RECIPE, 3)
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return {
        "switokd train": [*python, "switokd", "train", *recipe],
        "torchrun": [*torchrun, "-m", "switokd.train", *recipe],
    }


@dataclass(frozen=True)
class Start:
    """Measurements of one run."""

    first_step_seconds: float
    peak_mib: float
    wall_seconds: float


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give time_to_first_step, memory_of_a_run and restart_seconds."""
    by_side = commands(quick)
    starts: dict[str, list[Start]] = {side: [] for side in by_side}

    def run(side: str) -> float:
        say(f"start of a run with {side}")
        starts[side].append(watch(by_side[side]))
        return starts[side][-1].first_step_seconds

    ours, theirs = by_side
    pairs = alternate(1 if quick else 5, lambda: run(ours), lambda: run(theirs))
    what = f"{{}}, {' '.join(QUICK_RECIPE if quick else RECIPE)}, {ours} over {theirs}"
    walls = {
        f"wall_seconds of {side}": [run.wall_seconds for run in runs]
        for side, runs in starts.items()
    }
    yield Figure.of_pairs(
        FIGURES[0], pairs, target=1.0, at_least=False, what=what.format("seconds"), details=walls
    )
    peaks = [(a.peak_mib, b.peak_mib) for a, b in zip(*starts.values(), strict=True)]
    yield Figure.of_pairs(
        FIGURES[1], peaks, target=0.67, at_least=False, what=what.format("peak memory, MiB")
    )
    say("restarts after a rank was killed")
    yield Figure(
        FIGURES[2],
        tuple(restart_seconds(quick) for _ in range(1 if quick else 5)),
        target=3.0,
        at_least=False,
        what="seconds from the death of a rank to the next decision, with `switokd train`",
    )


def watch(command: Sequence[str], seconds: float = 300) -> Start:
    """Run a training command to its end. RuntimeError with its output if it fails."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        decision_log = Path(folder) / "out" / "decisions.jsonl"
        started = time.monotonic()
        child = subprocess.Popen(
            [*command, f"run_dir={folder}/out"],
            cwd=REPOSITORY,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        first_step, peak = 0.0, 0.0
        while child.poll() is None:
            peak = max(peak, family_mib(child.pid))
            elapsed = time.monotonic() - started
            if not first_step and decision_log.exists() and decision_log.stat().st_size:
                first_step = elapsed
            if elapsed > seconds:
                child.terminate()
            time.sleep(POLL_SECONDS)
        if child.returncode or not first_step:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{log.read()[-4000:]}")
        return Start(first_step, peak, time.monotonic() - started)


def restart_seconds(quick: bool) -> float:
    """Kill rank 1 of a run; return the seconds until the restarted run's first decision.

    RuntimeError with the run's output if there is none within 100 s.
    """
    recipe = (QUICK_RECIPE if quick else RECIPE)[0]
    command = [sys.executable, "-m", "switokd", "train", recipe, "schedule.epochs=500"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        starts, decisions = (Path(folder, "out", n) for n in ("attempts.jsonl", "decisions.jsonl"))
        child = subprocess.Popen(
            [*command, "checkpoint.every_steps=20", f"run_dir={folder}/out"],
            cwd=REPOSITORY,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 100

        def wait_for_lines(file: Path, lines: int) -> int:
            """Wait until a file has so many lines; return how many it has."""
            while not file.exists() or (n := file.read_bytes().count(b"\n")) < lines:
                if child.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)}\n{log.read()[-4000:]}")
                time.sleep(POLL_SECONDS / 5)
            return n

        try:
            wait_for_lines(decisions, 60)
            family = psutil.Process(child.pid).children(recursive=True)
            (victim,) = (each for each in family if each.name() == "switokd rank 1")
            victim.kill()
            killed = time.monotonic()
            wait_for_lines(starts, 2)  # the record is cut back by then
            wait_for_lines(decisions, wait_for_lines(decisions, 1) + 1)
            return time.monotonic() - killed
        finally:
            child.terminate()
            child.wait()


def family_mib(pid: int) -> float:
    """Return the proportional set size, in MiB, of a process and all its descendants."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    return total / 2**20
