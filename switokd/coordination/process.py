"""Starts a coordinator as a child of rank 0, for runs whose run file names no coordinator.

The child serves until its standard input closes. The operating system closes it when rank 0 ends,
so the child ends some seconds after rank 0 at the latest.

Not covered: restarting a coordinator that dies.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from switokd.coordination.membership import Endpoint
from switokd.errors import CoordinatorError, UsageError
from switokd.runtime.environment import Environment

START_SECONDS = 30.0
"""Longest wait for the coordinator to be ready."""


@contextmanager
def coordinator_process(env: Environment, http_port: int, strategy: str = "") -> Iterator[Endpoint]:
    """Start a coordinator on a free port, yield its addresses, stop it at the end.

    It listens on loopback if all ranks run on this machine, else on all interfaces. http_port: port
    of its metrics. strategy: import string of the user's own strategy, which the coordinator
    imports from the same folders as this process; empty for a built-in strategy.
    UsageError if `http_port` is in use, CoordinatorError if the coordinator does not start.
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
        start_new_session=True,  # Ctrl-C must not stop it: it tells the other ranks that one ended
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        readable, _, _ = select.select([child.stdout], [], [], START_SECONDS)
        line = child.stdout.readline() if readable else b""
        if not line:
            code = child.wait() if readable else None
            # The child has printed the reason on standard error.
            if code == UsageError.exit_code:
                raise UsageError(f"coordinator.http_port: {http_port} cannot be used")
            state = (
                f"ended with code {code}"
                if readable
                else f"was not ready within {START_SECONDS:g} s"
            )
            raise CoordinatorError(f"the coordinator did not start: it {state}")
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
