"""How a rank ends, without a training: what it says of a launcher that is gone.

Not covered: whole runs whose parts are killed (`test_faults.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from tests.support import process, wait_until

LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "rank.py"], stdin=subprocess.PIPE).wait()
"""
RANK = """
import sys
from switokd.environment import environment
from switokd.errors import CollectiveError
from switokd.lifecycle import follow_launcher, one_line_errors

env = environment()
follow_launcher(env)
with one_line_errors(env, "rank 0"):
    print("ready", flush=True)
    sys.stdin.read()  # as from the launcher's store, which ends just before the launcher
    raise CollectiveError("joining the process group", "connection closed")
"""
TORCHRUNS = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "TORCHELASTIC_RUN_ID": "any",
}


def test_the_end_of_the_launchers_store_does_not_hide_that_the_launcher_is_gone(
    tmp_path: Path,
) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)
    log = tmp_path / "log"
    with process([sys.executable, "launcher.py"], tmp_path, log, **TORCHRUNS) as launcher:
        wait_until(lambda: "ready" in log.read_text(), 30, "a rank")
        (rank,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        _, alive = psutil.wait_procs([rank], timeout=15)
        assert not alive
    said = f"switokd: rank 0: the launcher (process {launcher.pid}) is gone"
    assert log.read_text().splitlines() == ["ready", said]
