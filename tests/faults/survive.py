"""A run that is started again until it is done, whatever happens to it; and its comparison.

Not covered: restarts by `switokd train` itself (`tests/training/test_resume.py`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.faults.actions import OUTSIDE
from tests.faults.moments import PLAN, START, faulty_ranks
from tests.faults.outside import Outside
from tests.faults.plan import Fault, used, write_plan
from tests.preloaded import Forked, forked
from tests.support import lines

WORDS = ["digits-1t1s", "networks.teacher.model=wrn-10-1", "networks.student.model=wrn-10-1"]
WORDS += ["schedule.epochs=2", "checkpoint.every_steps=5", "coordinator.deadline=0.3"]
"""44 steps of two ranks."""

MOST_STARTS = 12
STALL_SECONDS = 200.0
"""After so long without a new line in record or log, a run hangs."""

OUTLIVE_SECONDS = 10.0
"""How long a rank may live on after its launcher."""

HANGS = -1

CODES = {0, 2, 3, 4, 130, 143, -9, -15}
"""Documented exit codes, and those of a launcher that a signal has ended."""


@dataclass
class Survival:
    """What became of a run."""

    folder: Path
    codes: list[int] = field(default_factory=list)
    """Exit code of each start."""
    seconds: float = 0.0
    used: list[Fault] = field(default_factory=list)
    """The faults that have happened."""
    problems: list[str] = field(default_factory=list)
    """What must not be: an endless run, a traceback, a rank that outlives its launcher."""

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "out" / "summary.json").read_text())
        return summary

    @property
    def log(self) -> str:
        """What the ranks of all starts have printed."""
        return (self.folder / "log").read_text()


def survive(
    folder: Path,
    faults: Sequence[Fault],
    outside: Outside | None = None,
    words: Sequence[str] = (),
    ranks: Callable[[int, tuple[str, ...]], None] = faulty_ranks,
) -> Survival:
    """Train in `folder`/out while faults happen; start again until the run is done.

    outside: the coordinator; None: the run starts its own. words: settings after `WORDS`.
    """
    result = Survival(folder)
    plan, log = folder / "plan", folder / "log"
    write_plan(plan, faults)
    arguments = (*WORDS, *words, "run_dir=out", "resume=auto")
    env = {PLAN: str(plan)}
    if outside:
        arguments = (*arguments, f"coordinator.address={outside.address}")
        env[OUTSIDE] = str(outside.orders_port)
    began = time.monotonic()
    for start in range(1, MOST_STARTS + 1):
        env[START] = str(start)
        with forked(ranks, 2, arguments, cwd=folder, out=log, err=None, **env) as child:
            code = _wait(child, (folder / "out" / "decisions.jsonl", log))
            if code is None:
                result.problems.append(f"start {start} hangs")
                code = HANGS
            else:
                _wait_for_ranks(plan, result)
        result.codes.append(code)
        if code not in CODES and code != HANGS:
            result.problems.append(f"start {start} has exit code {code}")
        if code in (0, HANGS):
            break
    else:
        result.problems.append(f"not done after {MOST_STARTS} starts: {result.codes}")
    result.seconds = time.monotonic() - began
    result.used = used(plan)
    if "Traceback (most recent call last)" in result.log:
        result.problems.append("a traceback is in the log")
    return result


def _wait(child: Forked, files: Sequence[Path]) -> int | None:
    """Return the exit code of a start; None if it hangs."""
    sizes, since = [-1], time.monotonic()
    while (code := child.poll()) is None:
        now = [file.stat().st_size if file.exists() else 0 for file in files]
        if now != sizes:
            sizes, since = now, time.monotonic()
        if time.monotonic() - since > STALL_SECONDS:
            return None
        time.sleep(0.02)
    return code


def _wait_for_ranks(plan: Path, result: Survival) -> None:
    """Wait until the ranks have ended, which must not outlive their launcher for long."""
    alive = []
    for file in plan.glob("*.pid"):
        pid = int(file.read_text() or 0)
        if pid and psutil.pid_exists(pid):
            alive.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(alive, timeout=OUTLIVE_SECONDS)
    for process in alive:
        result.problems.append(f"process {process.pid} outlives its launcher")
        process.kill()


def differences(one: Path, other: Path) -> list[str]:
    """Return the results of two run folders that differ; empty if all bits are the same."""
    files = [sorted(p.relative_to(f) for p in f.glob("weights/**/*.pt")) for f in (one, other)]
    if files[0] != files[1]:
        return [f"other files: {files}"]
    names = [Path("decisions.jsonl"), *files[0]]
    found = [str(n) for n in names if (one / n).read_bytes() != (other / n).read_bytes()]
    if _metrics(one) != _metrics(other):
        found.append("metrics.jsonl")
    networks = [json.loads((f / "summary.json").read_text())["networks"] for f in (one, other)]
    if networks[0] != networks[1]:
        found.append("summary.json: networks")
    return found


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times."""
    return [
        {key: value for key, value in line.items() if key != "samples_per_second"}
        for line in lines(folder / "metrics.jsonl")
    ]


def undisturbed(folder: Path) -> Path:
    """Train without a fault and return the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    result = survive(folder, [])
    assert result.codes == [0], result.log
    return folder / "out"


def check(result: Survival, expected: Path) -> list[str]:
    """Return all that is wrong with a run: problems, and differences to the undisturbed one."""
    if result.codes[-1] == 0:
        return result.problems + [
            f"differs: {d}" for d in differences(result.folder / "out", expected)
        ]
    return result.problems


def remove(result: Survival) -> None:
    """Remove the files of a run."""
    shutil.rmtree(result.folder)
