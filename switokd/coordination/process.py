"""The coordinator that rank 0 starts when the run file names none.

The child serves until its standard input closes, so it cannot outlive rank 0, however rank 0
ends. Not covered: starting one anew when it dies.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from switokd.coordination.client import Endpoint
from switokd.errors import CoordinatorError, UsageError
from switokd.runtime.environment import Environment

START_SECONDS = 30.0


@contextmanager
def coordinator_process(env: Environment, http_port: int, strategy: str = "") -> Iterator[Endpoint]:
    """Start a coordinator as a child on a free port; stop it at the end.

    strategy: import string of one of the user's own, which it then imports as this process does.
    It listens on this machine's loopback, or on all interfaces where ranks run elsewhere.
    UsageError if http_port is taken, CoordinatorError if it does not start.
    """
    host = "127.0.0.1" if env.one_host else "0.0.0.0"
    command = [sys.executable, "-m", "switokd", "coordinator", "--follow-stdin"]
    command += ["--host", host, "--port", "0", "--http-port", str(http_port)]
    env_of_child = dict(os.environ)
    if strategy:
        command += ["--strategy", strategy]
        env_of_child["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    child = subprocess.Popen(
        command,
        env=env_of_child,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the ranks; the coordinator then reports on them
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        readable, _, _ = select.select([child.stdout], [], [], START_SECONDS)
        line = child.stdout.readline() if readable else b""
        if not line:
            code = child.wait() if readable else None
            # The child has said why on standard error.
            if code == UsageError.exit_code:
                raise UsageError(f"coordinator.http_port: {http_port} cannot be used")
            state = f"ended with code {code}" if readable else "said nothing"
            raise CoordinatorError(f"the coordinator {state} instead of starting")
        ready = json.loads(line)
        reachable = "127.0.0.1" if env.one_host else env.master_addr
        port, http = (ready[key].rpartition(":")[2] for key in ("grpc", "http"))
        yield Endpoint(f"{reachable}:{port}", f"{reachable}:{http}", ready["pid"])
    finally:
        with suppress(OSError):
            child.stdin.close()
        try:
            child.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
