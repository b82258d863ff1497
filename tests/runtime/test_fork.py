"""Ranks that one process starts: how it waits for them, and what a command imports.

Not covered: whole runs that end badly (`test_launcher.py`, `test_faults.py`).
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from switokd.runtime import rank_processes
from switokd.runtime.launcher import environment_of_ranks
from tests.preloaded import call, train_ranks
from tests.support import run

STOPPED = "kill -STOP $$"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
COMPILER = ("torch._dynamo", "torch._inductor", "torch.onnx", "sympy")
SPY = """
import atexit, os, sys
from pathlib import Path
from torch import nn

def write():
    names = [*sys.modules, f"parent {os.getppid()}", f"threads {os.environ['OMP_NUM_THREADS']}"]
    Path(f"rank-{os.environ['RANK']}").write_text("\\n".join(names))

def build(in_channels, num_classes):
    atexit.register(write)
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
"""
THREADED_STRATEGY = """
import threading
from switokd.distillation.strategies import STRATEGIES

threading.Thread(target=threading.Event().wait, daemon=True).start()
Strategy = STRATEGIES["vanilla"]
"""
SPIED = ["networks.teacher.model=spy:build", "networks.student.model=spy:build"]
ONE_STEP = ["digits-1t1s", "schedule.epochs=1", "schedule.max_steps=1", "run_dir=out"]


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The launcher's end of a connection and the other end; restores the signal handlers."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(*programs: str) -> dict[int, int]:
    """Start shell programs; return their ranks by process id."""
    spawned = [os.posix_spawn("/bin/sh", ["sh", "-c", text], os.environ) for text in programs]
    return {pid: rank for rank, pid in enumerate(spawned)}


def assert_ended(ranks: dict[int, int]) -> None:
    """Check that all ranks have ended and were waited for."""
    for pid in ranks:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("programs", "code", "message"),
    [
        (["true", "sleep 0.2"], 0, ""),
        (["sleep 60", "exit 3"], 3, ""),
        (["sleep 60", "kill -9 $$"], 4, "process {}, was killed by SIGKILL"),
        (["exit 4", "kill -9 $$"], 4, "process {}, was killed by SIGKILL"),
        # The rank that reports a lost peer ends before that peer.
        (["exit 4", "sleep 0.4; exit 2"], 2, ""),
    ],
)
def test_the_first_failure_is_the_exit_code_and_stops_the_other_ranks(
    programs: list[str],
    code: int,
    message: str,
    connection: tuple[socket.socket, socket.socket],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_processes, "POLL_SECONDS", 0.3)  # both failures are seen in one poll
    ranks = start(*programs)
    assert rank_processes.wait_for_ranks(ranks, connection[1], lambda rank: f"rank {rank}") == code
    line = f"switokd: rank 1, {message.format(max(ranks))}\n" if message else ""
    assert capsys.readouterr().err == line
    assert_ended(ranks)


def test_the_ranks_end_when_the_launcher_is_gone(
    connection: tuple[socket.socket, socket.socket],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_processes, "FAILED_SECONDS", 0.2)
    ranks = start("sleep 60", STOPPED)
    connection[0].close()
    assert rank_processes.wait_for_ranks(ranks, connection[1], str) == 4
    assert capsys.readouterr().err == f"switokd: the launcher (process {os.getppid()}) is gone\n"
    assert_ended(ranks)


@pytest.mark.parametrize("program", ["trap '' TERM; while :; do sleep 0.1; done", "kill -STOP $$"])
def test_a_rank_that_does_not_end_after_anothers_failure_is_killed_soon(
    program: str, connection: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_processes, "FAILED_SECONDS", 0.2)
    ranks = start(program, "sleep 0.5; exit 2")
    assert rank_processes.wait_for_ranks(ranks, connection[1], str) == 2
    assert_ended(ranks)


def test_ranks_that_are_asked_to_end_have_time_until_one_has_failed(
    connection: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first rank saves something for longer than a rank may take after a failure."""
    monkeypatch.setattr(rank_processes, "FAILED_SECONDS", 0.2)
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    saves = f"trap 'sleep 0.6; touch {saved}; exit 143' TERM; "
    waits = f"while [ ! -e {ready} ]; do sleep 0.05; done; "
    asks = f"while :; do kill -TERM {os.getpid()}; sleep 0.05; done"
    stays = f"trap '' TERM; touch {ready}; while :; do sleep 0.1; done"
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the first may come too early
    try:
        ranks = start(saves + waits + asks, stays)
        assert rank_processes.wait_for_ranks(ranks, connection[1], str) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved.exists()
    assert_ended(ranks)


@pytest.mark.timeout(120)
def test_the_launcher_does_not_import_torch_and_a_rank_no_compiler(tmp_path: Path) -> None:
    """Only the launcher itself prints import times."""
    (tmp_path / "spy.py").write_text(SPY)
    command = [sys.executable, "-X", "importtime", "-m", "switokd", "train", *ONE_STEP, *SPIED]
    code, _, err = run(command, tmp_path)
    assert code == 0, err
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert "switokd.runtime.launcher" in imported
    assert not imported & {"torch", "grpc", "sklearn", "scipy"}
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    ranks = [(tmp_path / f"rank-{rank}").read_text().splitlines() for rank in (0, 1)]
    for modules in ranks:
        assert "torch" in modules
        assert not {name for name in modules if name.startswith(COMPILER)}
        assert "switokd.runtime.fork" in modules  # forked, not started
    parents = [[line for line in rank if line.startswith("parent ")] for rank in ranks]
    assert parents[0] == parents[1]


@pytest.mark.timeout(120)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere OpenBLAS has threads")
def test_a_process_with_several_threads_per_rank_can_be_forked(tmp_path: Path) -> None:
    code = (
        "from switokd import worker; from switokd.runtime.fork import can_fork; print(can_fork())"
    )
    env = {**environment_of_ranks(), "OMP_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_ranks_are_new_processes_where_a_fork_is_not_safe(tmp_path: Path) -> None:
    """The user's strategy starts a thread when it is imported."""
    (tmp_path / "spy.py").write_text(SPY)
    (tmp_path / "mine.py").write_text(THREADED_STRATEGY)
    strategy = "distillation.strategy=mine:Strategy"
    code, _, err = call(tmp_path, train_ranks, 2, (*ONE_STEP, *SPIED, strategy))
    assert code == 0, err
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    for rank in (0, 1):
        modules = (tmp_path / f"rank-{rank}").read_text().splitlines()
        assert "switokd.runtime.fork" not in modules


def test_help_imports_neither_torch_nor_the_configuration(tmp_path: Path) -> None:
    code, out, err = run([sys.executable, "-X", "importtime", "-m", "switokd", "--help"], tmp_path)
    assert code == 0
    assert "train" in out
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert "switokd.cli.main" in imported
    heavy = {"torch", "numpy", "grpc", "pydantic", "yaml", "matplotlib", "joblib", "asyncio"}
    assert not imported & heavy
