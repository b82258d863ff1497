"""Starts a coordinator as a child process, for runs whose run file names no coordinator.

The child serves until its standard input closes. The operating system closes it when this process
ends, so the child never outlives this process.

Not covered: restarting a coordinator that dies.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from switokd.config.config import Config
from switokd.coordination.membership import Endpoint
from switokd.errors import CoordinatorError, UsageError
from switokd.runtime.environment import Environment

START_SECONDS = 30.0
"""Longest wait for the coordinator to be ready."""


@contextmanager
def coordinator_process(config: Config, env: Environment) -> Iterator[Callable[[], Endpoint]]:
    """Start a coordinator on a free port; stop it at the end.

    Yields at once, so that the caller can import PyTorch while the coordinator starts. The yielded
    function waits until the coordinator is ready, and returns its addresses. The coordinator
    listens on loopback if all ranks run on this machine, else on all interfaces. It imports the
    user's own strategy, if there is one, from the same folders as this process.
    The function raises UsageError if `coordinator.http_port` is in use, and CoordinatorError if the
    coordinator does not start.
    """
    http_port, strategy = config.coordinator.http_port, config.distillation.strategy
    host = "127.0.0.1" if env.one_host else "0.0.0.0"
    command = [sys.executable, "-m", "switokd", "coordinator", "--follow-stdin"]
    command += ["--host", host, "--port", "0", "--http-port", str(http_port)]
    env_of_child = dict(os.environ)
    if ":" in strategy:
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
    try:
        yield lambda: _wait_until_ready(child, http_port, env)
    finally:
        with suppress(OSError):
            child.stdin.close()
        try:
            child.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_until_ready(child: subprocess.Popen[bytes], http_port: int, env: Environment) -> Endpoint:
    """Return the addresses that the coordinator prints when it is ready."""
    assert child.stdout is not None
    readable, _, _ = select.select([child.stdout], [], [], START_SECONDS)
    line = child.stdout.readline() if readable else b""
    if not line:
        code = child.wait() if readable else None
        # The child has printed the reason on standard error.
        if code == UsageError.exit_code:
            raise UsageError(f"coordinator.http_port: {http_port} cannot be used")
        state = (
            f"ended with code {code}" if readable else f"was not ready within {START_SECONDS:g} s"
        )
        raise CoordinatorError(f"the coordinator did not start: it {state}")
    ready = json.loads(line)
    reachable = "127.0.0.1" if env.one_host else env.master_addr
    port, http = (ready[key].rpartition(":")[2] for key in ("grpc", "http"))
    return Endpoint(f"{reachable}:{port}", f"{reachable}:{http}", ready["pid"])
