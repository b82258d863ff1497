"""Starts a coordinator as a child process, for runs whose run file names no coordinator.

The child serves until its standard input closes. The operating system closes it when this process
ends, so the child never outlives this process. A child that dies is started again on the same
ports; the run goes on meanwhile, and tells it again what it has forgotten.

If the ranks are on several machines, the child speaks TLS and asks for a token. Certificate and
token are made here, for this run alone, and lie in a private folder until the end.

Not covered: a child that hangs.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from switokd.config.config import Config
from switokd.coordination.membership import Endpoint
from switokd.coordination.tokens import TOKEN
from switokd.distillation.topology import Topology
from switokd.errors import CoordinatorError, SwitokdError, UsageError
from switokd.runtime.durable import replace_file
from switokd.runtime.environment import Environment
from switokd.runtime.interpreter import python_command
from switokd.runtime.lifecycle import print_warning
from switokd.runtime.waiting import waiting
from switokd.services.coordinator.addresses import OPERATOR_TOKEN, WORKER_TOKEN
from switokd.services.coordinator.limits import DEFAULTS
from switokd.tracing.opening import is_installed

START_SECONDS = 30.0
"""Longest wait for the coordinator to be ready."""

STOP_SECONDS = 4.0
"""How long the coordinator may take to end, before SIGKILL; it waits for the ends of streams."""

VALID_DAYS = 3650
"""How long the certificate of such a coordinator is valid; it is removed at the run's end."""

TOKENS = (TOKEN, WORKER_TOKEN, OPERATOR_TOKEN)
"""Environment variables that the child does not need."""

PAUSES = (0.0, 0.2, 1.0, 5.0, 20.0)
"""Seconds before each attempt to start a coordinator again; after the last one, none follows."""


@contextmanager
def coordinator_process(config: Config, env: Environment) -> Iterator[Callable[[], Endpoint]]:
    """Start a coordinator on a free port; stop it at the end.

    Yields at once, so that the caller can import PyTorch while the coordinator starts. The yielded
    function waits until the coordinator is ready, and returns its addresses. The coordinator
    listens on loopback if all ranks run on this machine, else on all interfaces, with TLS unless
    the run file allows plain text; its metrics then stay on loopback. It imports the
    user's own strategy, if there is one, from the same folders as this process.
    The function raises UsageError if `coordinator.http_port` is in use, and CoordinatorError if the
    coordinator does not start.
    """
    process = CoordinatorProcess(config, env)
    try:
        yield process.wait_until_ready
    finally:
        process.close()


class PrivateAccess:
    """Certificate and token of the coordinator of one run. host: where the ranks reach it."""

    def __init__(self, host: str) -> None:
        from switokd.coordination.certificates import Authority

        self.token = secrets.token_hex(32)
        self._folder = tempfile.TemporaryDirectory(prefix="switokd-")  # only its owner may enter
        authority = Authority.new(VALID_DAYS)
        issued = authority.server([host], VALID_DAYS)
        self.ca = authority.made.certificate.decode()
        files = {"crt": issued.certificate, "key": issued.key, "token": self.token.encode()}
        for name, content in files.items():
            replace_file(self._path(name), content, mode=0o600)

    @property
    def options(self) -> list[str]:
        """Options of `switokd coordinator`."""
        return [
            *("--http-host", "127.0.0.1"),
            *("--tls-certificate", str(self._path("crt")), "--tls-key", str(self._path("key"))),
            *("--worker-token-file", str(self._path("token"))),
        ]

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()

    def _path(self, name: str) -> Path:
        return Path(self._folder.name, f"coordinator.{name}")


def size_options(topology: Topology, world_size: int) -> list[str]:
    """Return the options with which a coordinator takes a run of this size.

    The default limits keep runs of strangers from slowing each other; this run has its own
    coordinator.
    """
    pairs = len(topology.pairs)
    needed = {
        "max_ranks": world_size,
        "max_networks": len(tuple(topology)),
        "max_pairs": pairs,
        "max_parts": pairs * world_size,
    }
    return [
        word
        for name, number in needed.items()
        if number > getattr(DEFAULTS, name)
        for word in (f"--{name.replace('_', '-')}", str(number))
    ]


class CoordinatorProcess:
    """The child process, and the thread that starts it again."""

    def __init__(self, config: Config, env: Environment) -> None:
        self._strategy, self._env = config.distillation.strategy, env
        self._size = size_options(config.topology, env.world_size)
        self._host = "127.0.0.1" if env.one_host else "0.0.0.0"
        self._plaintext = config.coordinator.allow_plaintext and not env.one_host
        self._http_port = config.coordinator.http_port
        # Without the extra, a rank says so.
        self._traces_every = config.tracking.traces_every if is_installed() else 0
        self._is_closing = threading.Event()
        self._private: PrivateAccess | None = None
        if not env.one_host and not self._plaintext:
            self._private = PrivateAccess(env.master_addr)
        self._child = self._start(0, self._http_port)

    def wait_until_ready(self) -> Endpoint:
        """Return the addresses once the coordinator serves; errors as `coordinator_process`."""
        ready = _ready(self._child, self._http_port)
        reachable = "127.0.0.1" if self._env.one_host else self._env.master_addr
        port, http_port = (int(ready[key].rpartition(":")[2]) for key in ("grpc", "http"))
        threading.Thread(
            target=self._keep_running, args=(port, http_port), daemon=True, name="coordinator"
        ).start()
        http = reachable if self._plaintext else "127.0.0.1"
        endpoint = Endpoint(f"{reachable}:{port}", f"{http}:{http_port}", self._child.pid)
        if self._private is None:
            return endpoint
        return replace(endpoint, ca=self._private.ca, token=self._private.token)

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
        _close_pipes(self._child)
        if self._private:
            self._private.close()

    def _start(self, port: int, http_port: int) -> subprocess.Popen[bytes]:
        command = [*python_command("switokd"), "coordinator", "--follow-stdin"]
        command += ["--host", self._host, "--port", str(port), "--http-port", str(http_port)]
        command += self._size
        if self._private:
            command += self._private.options
        if self._traces_every:
            command += ["--traces-every", str(self._traces_every)]
        if self._plaintext:
            command += ["--allow-plaintext"]
        env_of_child = {key: value for key, value in os.environ.items() if key not in TOKENS}
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
            print_warning(f"the coordinator (process {self._child.pid}) is gone and starts again")
            child = self._start(port, http_port)
            self._child, before = child, self._child
            _close_pipes(before)
            if self._is_closing.is_set():  # `close` may have seen the one before
                child.kill()
            with suppress(SwitokdError):
                _ready(child, http_port)
        self._child.wait()
        if not self._is_closing.is_set():
            print_warning("the coordinator has died too often: the run goes on without it")


def _close_pipes(child: subprocess.Popen[bytes]) -> None:
    """Close what connects this process to a child that has ended."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _ready(child: subprocess.Popen[bytes], http_port: int) -> dict[str, str]:
    """Return what the coordinator prints when it is ready."""
    assert child.stdout is not None
    with waiting(f"the coordinator (process {child.pid}) to start", START_SECONDS):
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
