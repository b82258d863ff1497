"""What the figures were taken on.

Not covered: clock rates, and who else is on the machine.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import grpc
import torch

from switokd.environment import cores

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
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip()
