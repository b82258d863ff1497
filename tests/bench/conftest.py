"""Parts of the benchmark that several tests look at, measured once.

Not covered: the figures themselves (`test_bench.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import preloaded
from tests.support import REPOSITORY, run

PASSIVE = "passive"
"""Value of OMP_WAIT_POLICY. Busy-waiting threads would be ten times slower on shared cores."""


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    """The benchmark's ranks are forked from the same server as other tests' processes."""
    preloaded.start()


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], Path]:
    """Function that measures a group once, also for several test processes; the folder with it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def measured(group: Sequence[str]) -> Path:
        folder = shared / f"quick-{group[0]}"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "ended.json").exists():
                options = ["--only", ",".join(group), "--out", str(folder / "results.json")]
                command = [sys.executable, "-m", "bench", "--quick", *options]
                ended = run(command, REPOSITORY, seconds=280, OMP_WAIT_POLICY=PASSIVE)
                (folder / "ended.json").write_text(json.dumps(ended))
        return folder

    return measured
