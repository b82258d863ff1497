"""What the figures were taken on, and who else used it meanwhile.

Not covered: clock rates; a host's other machines, but for the time that they take from this one.
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
    """Hardware and versions."""
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
    """What runs now: commit, whether files differ from it, date."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def load() -> float:
    """Mean number of processes that were running or ready to, over the last minute."""
    return os.getloadavg()[0]


def busy_seconds(of: Iterable[int]) -> float:
    """Processor time that some cores have worked, for whomever, since the machine started."""
    # Guests' time is part of user's. What was stolen from a virtual machine counts.
    idle = {"idle", "iowait", "guest", "guest_nice"}
    times = psutil.cpu_times(percpu=True)
    return float(sum(getattr(times[i], f) for i in of for f in set(times[i]._fields) - idle))


class Others:
    """Watches, from its making on, what others take of this process' cores."""

    def __init__(self) -> None:
        there = range(len(psutil.cpu_times(percpu=True)))
        bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(there)
        # A container may have a part of the cores' time, or know them by other numbers.
        self._cores = sorted(bound) if bound <= set(there) and cores() == len(bound) else []
        self._at_start = time.monotonic(), self._taken()

    def share(self) -> float | None:
        """Of all time that the cores have had since then, 0 to 1; None where that is not known.

        Not theirs is what this process took, and what it started, with all that came of that.
        """
        started, before = self._at_start
        had = len(self._cores) * (time.monotonic() - started)
        if not had:
            return None
        taken = max(self._taken() - before, 0.0)
        return min(taken / had, 1.0)  # the system counts in hundredths of a second

    def _taken(self) -> float:
        me = psutil.Process()
        ours = 0.0
        for process in (me, *me.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                ours += times.user + times.system + times.children_user + times.children_system
        return busy_seconds(self._cores) - ours


def _cpu() -> tuple[str, set[str]]:
    """Model and flags, as far as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found.get("model name", platform.machine()), set(found.get("flags", "").split())


def _git(*arguments: str) -> str:
    """What git says; nothing where there is none."""
    with suppress(OSError):
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
        return done.stdout.strip()
    return ""
