"""The machine that figures are measured on, and the load of other processes on it.

Not covered: clock rates; other virtual machines of the host, except for stolen CPU time.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch

from switokd.runtime.environment import cores

REPOSITORY = Path(__file__).parent.parent


def describe() -> dict[str, Any]:
    """Hardware and versions, for results.json."""
    model, flags = _cpu()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "hardware": {
            "cpu": model,
            "cores": cores(),
            "avx512_bf16": "avx512_bf16" in flags,
            "amx_bf16": "amx_bf16" in flags,
            "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "grpcio": grpc.__version__,
        },
    }


def source() -> dict[str, Any]:
    """Commit of the source, whether files differ from the commit, and the date."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def load() -> float:
    """Load average of the last minute: mean number of runnable processes."""
    return os.getloadavg()[0]


def busy_seconds(of: Iterable[int]) -> float:
    """CPU seconds that the cores `of` have worked since the machine started, for any process."""
    # The time of guests is part of the user time. Time stolen by the hypervisor counts as work.
    idle = {"idle", "iowait", "guest", "guest_nice"}
    times = psutil.cpu_times(percpu=True)
    return float(sum(getattr(times[i], f) for i in of for f in set(times[i]._fields) - idle))


class Others:
    """Measures the CPU time that other processes take from this process's cores."""

    def __init__(self) -> None:
        all_cores = set(range(len(psutil.cpu_times(percpu=True))))
        bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else all_cores
        # A container may have only a share of the cores' time, or other numbers for the cores.
        self._cores = sorted(bound) if bound <= all_cores and cores() == len(bound) else []
        self._at_start = time.monotonic(), self._taken()

    def share(self) -> float | None:
        """Share of the cores' time since the construction, 0 to 1; None if unknown.

        The time of this process and of its child processes does not count.
        """
        started, taken_before = self._at_start
        available = len(self._cores) * (time.monotonic() - started)
        if not available:
            return None
        taken = max(self._taken() - taken_before, 0.0)
        return min(taken / available, 1.0)  # the system counts in steps of 10 ms

    def _taken(self) -> float:
        me = psutil.Process()
        ours = 0.0
        for process in (me, *me.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                ours += times.user + times.system + times.children_user + times.children_system
        return busy_seconds(self._cores) - ours


def _cpu() -> tuple[str, set[str]]:
    """Model and flags of the CPU; flags only on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def _git(*arguments: str) -> str:
    """Output of a git command; empty if git is not installed."""
    with suppress(OSError):
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
        return done.stdout.strip()
    return ""
