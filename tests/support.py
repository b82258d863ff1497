"""What tests share: required programs, real processes that cannot outlive a test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TORCHRUN = str(BIN / "torchrun")


def require(program: str, package: str) -> str:
    """Path of a program; without it the test is skipped, in CI it fails."""
    path = shutil.which(program)
    if path is None:
        missing = f"{program} is not installed (Debian package {package})"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return path


def unshare(flags: str) -> list[str]:
    """What a command begins with that runs in namespaces of its own; skipped as `require` does."""
    command = [require("unshare", "util-linux"), flags]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("this machine permits no namespaces")
        pytest.skip("this machine permits no namespaces")
    return command


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until `condition` returns a true value, and return this value; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)
    return value


def environment(**more: str) -> dict[str, str]:
    """The test's own environment with one thread per process and this interpreter's programs."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **more}


@contextmanager
def process(
    command: Sequence[str], cwd: Path, log: Path | None = None, **env: str
) -> Iterator[subprocess.Popen[str]]:
    """Start a program in its own session; at the end, kill its remaining processes.

    Standard output and standard error go to the file `log`; without a `log`, to one pipe each.
    """
    output = log.open("w") if log else None
    child = subprocess.Popen(
        list(command),
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.PIPE,
        stdout=output or subprocess.PIPE,
        stderr=subprocess.STDOUT if output else subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        kill_family(child.pid)
        child.wait(10)
        for stream in (child.stdin, child.stdout, child.stderr, output):
            if stream:
                stream.close()


def kill_family(leader: int) -> None:
    """Kill a process that leads a session, and all processes that it has started."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(leader).children(recursive=True)
    for each in family:  # by process id: ranks and coordinators have sessions of their own
        with suppress(psutil.NoSuchProcess):
            each.kill()
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def run(command: Sequence[str], cwd: Path, seconds: float = 90, **env: str) -> tuple[int, str, str]:
    """Run a program to its end: exit code, standard output, standard error."""
    with process(command, cwd, None, **env) as child:
        out, err = child.communicate(timeout=seconds)
        return child.returncode, out, err


def torchrun(processes: int, *arguments: str) -> list[str]:
    """The README's command for one machine."""
    return [
        TORCHRUN,
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "switokd.train",
        *arguments,
    ]


def switokd_train(processes: int, *arguments: str) -> list[str]:
    """`switokd train` with this number of ranks; starts in half the CPU time of torchrun."""
    return [sys.executable, "-m", "switokd", "train", f"--processes={processes}", *arguments]


def lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
