"""Starts a coordinator as a child process, for runs whose run file names no coordinator.

The child serves until its standard input closes. The operating system closes it when this process
ends, so the child never outlives this process. A child that dies is started again on the same
ports; the run goes on meanwhile, and tells it again what it has forgotten.

Not covered: a child that hangs.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from switokd.config.config import Config
from switokd.coordination.membership import Endpoint
from switokd.errors import CoordinatorError, SwitokdError, UsageError
from switokd.runtime.environment import Environment
from switokd.runtime.lifecycle import print_error

START_SECONDS = 30.0
"""Longest wait for the coordinator to be ready."""

STOP_SECONDS = 4.0
"""How long the coordinator may take to end, before SIGKILL; it waits for the ends of streams."""

PAUSES = (0.0, 0.2, 1.0, 5.0, 20.0)
"""Seconds before each attempt to start a coordinator again; after the last one, none follows."""


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
    process = CoordinatorProcess(config, env)
    try:
        yield process.wait_until_ready
    finally:
        process.close()


class CoordinatorProcess:
    """The child process, and the thread that starts it again."""

    def __init__(self, config: Config, env: Environment) -> None:
        self._strategy, self._env = config.distillation.strategy, env
        self._host = "127.0.0.1" if env.one_host else "0.0.0.0"
        self._http_port = config.coordinator.http_port
        self._is_closing = threading.Event()
        self._child = self._start(0, self._http_port)

    def wait_until_ready(self) -> Endpoint:
        """Return the addresses once the coordinator serves; errors as `coordinator_process`."""
        ready = _ready(self._child, self._http_port)
        reachable = "127.0.0.1" if self._env.one_host else self._env.master_addr
        port, http_port = (int(ready[key].rpartition(":")[2]) for key in ("grpc", "http"))
        threading.Thread(
            target=self._keep_running, args=(port, http_port), daemon=True, name="coordinator"
        ).start()
        return Endpoint(f"{reachable}:{port}", f"{reachable}:{http_port}", self._child.pid)

    def close(self) -> None:
        """Stop the coordinator, once the run's streams have ended."""
        self._is_closing.set()
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()
        try:
            self._child.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _start(self, port: int, http_port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "switokd", "coordinator", "--follow-stdin"]
        command += ["--host", self._host, "--port", str(port), "--http-port", str(http_port)]
        env_of_child = dict(os.environ)
        if ":" in self._strategy:
            command += ["--strategy", self._strategy]
            env_of_child["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            command,
            env=env_of_child,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C must not stop it: it tells the others that one ended
        )

    def _keep_running(self, port: int, http_port: int) -> None:
        """Start the child again whenever it dies, until `close`."""
        for pause in PAUSES:
            self._child.wait()
            if self._is_closing.wait(pause):
                return
            print_error(f"the coordinator (process {self._child.pid}) is gone and starts again")
            child = self._start(port, http_port)
            self._child, before = child, self._child
            if before.stdout is not None:
                before.stdout.close()
            if self._is_closing.is_set():  # `close` may have seen the one before
                child.kill()
            with suppress(SwitokdError):
                _ready(child, http_port)
        self._child.wait()
        if not self._is_closing.is_set():
            print_error("the coordinator has died too often: the run goes on without it")


def _ready(child: subprocess.Popen[bytes], http_port: int) -> dict[str, str]:
    """Return what the coordinator prints when it is ready."""
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
    ready: dict[str, str] = json.loads(line)
    return ready
