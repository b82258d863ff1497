"""Processes that are forked from one that has imported PyTorch, instead of new interpreters.

To import PyTorch takes longer than most trainings of the tests. The ranks run the code of
`switokd train` from the process on that forks them; only the launcher is left out.

Not covered: the launcher, the curves that it draws, and several OpenMP threads. Their tests start
real commands (`support.py`).
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from switokd.cli.main import main
from switokd.cli.worker import worker_main
from switokd.coordination import connection
from switokd.runtime import fork, waiting
from switokd.runtime.environment import STARTED
from tests.support import environment, kill_family

MODULES = ["switokd.worker", "matplotlib.figure", "tests.preloaded"]

gc.freeze()  # the server's objects: a collection in a forked process would copy their pages


@cache
def _context() -> ForkServerContext:
    """Start this test process's server: with one thread, because only then a rank may be forked.

    Threads that the ranks start sleep at once when idle: other tests need the cores.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    needed = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    before = {name: os.environ[name] for name in needed if name in os.environ}
    os.environ.update(needed)
    forkserver.ensure_running()
    for name in needed:
        del os.environ[name]
    os.environ.update(before)
    return context


def start() -> None:
    """Start the server, so that no other code starts it with other modules or more threads."""
    _context()


class Forked:
    """A forked process, with the methods of `subprocess.Popen`."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@contextmanager
def forked(
    function: Callable[..., object],
    *arguments: object,
    cwd: Path,
    out: Path,
    err: Path | None = None,
    **env: str,
) -> Iterator[Forked]:
    """Call `function` in a process with its own session; at the end, kill all its processes.

    function: from a module that does not import pytest. Standard output goes to the file `out`;
    standard error goes there too, or to the file `err`.
    """
    streams = (out, err or out)
    process = _context().Process(
        target=_run, args=(function, arguments, cwd, streams, environment(**env))
    )
    process.start()
    child = Forked(process)
    try:
        yield child
    finally:
        kill_family(child.pid)
        child.wait(10)


def _run(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    cwd: Path,
    streams: tuple[Path, Path],
    env: dict[str, str],
) -> None:
    """Make this process look like a new one, and call `function`."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ[STARTED] = str(time.time())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # On a busy machine every start takes long; tests of what is said then set this themselves.
    waiting.FIRST_SECONDS = float(env.get("TESTS_FIRST_SECONDS", 60))
    connection.WAITS_SECONDS = waiting.FIRST_SECONDS
    # Loader processes come from a server of their own, not from that of the tests.
    forkserver._forkserver.__init__()  # type: ignore[misc]
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # before Python 3.13, multiprocessing leaves them out


def train_ranks(world_size: int, arguments: tuple[str, ...]) -> None:
    """Fork the ranks of `switokd train ARGUMENTS`, and end with the exit code of the run."""
    launcher, ranks_end = socket.socketpair()
    # Without a coordinator from the launcher, rank 0 starts one.
    start: dict[str, object] = {"coordinator": None, "settings": [], "again": False}
    launcher.sendall(json.dumps(start).encode() + b"\n")
    sys.argv = ["ranks", f"--fork={world_size}", f"--launcher={ranks_end.detach()}", *arguments]
    worker_main()


def run_script(world_size: int, script: str, arguments: tuple[str, ...]) -> None:
    """Run a Python file on each rank, with torchrun's environment; end with its exit code."""
    launcher, ranks_end = socket.socketpair()
    started = fork.start_ranks(world_size, ranks_end, [])
    if started:
        ranks, _store = started
        sys.exit(fork.wait_for_ranks(ranks, ranks_end, lambda rank: f"rank {rank}"))
    launcher.close()
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.getcwd())
    runpy.run_path(script, run_name="__main__")


def run_module(module: str, *arguments: str) -> None:
    """Run `python -m MODULE ARGUMENTS`."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def switokd_command(*arguments: str) -> None:
    """Run `switokd ARGUMENTS`; 'train' starts a new interpreter for its ranks."""
    sys.argv = ["switokd", *arguments]
    main()


def call(
    cwd: Path, function: Callable[..., object], *arguments: object, seconds: float = 90, **env: str
) -> tuple[int, str, str]:
    """Call `function` as `forked` does: exit code, standard output, standard error."""
    cwd.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with forked(function, *arguments, cwd=cwd, out=out, err=err, **env) as child:
            code = child.wait(seconds)
        return code, out.read_text(), err.read_text()


def train(cwd: Path, processes: int, *arguments: str, seconds: float = 100, **env: str) -> Path:
    """Train in `cwd`/out and return that folder; fails with the output if training fails."""
    words = (*arguments, "run_dir=out")
    code, out, err = call(cwd, train_ranks, processes, words, seconds=seconds, **env)
    assert code == 0, f"{out}\n{err}"
    return cwd / "out"
