"""`switokd train` as a launcher: exit codes, and what it says when a rank ends badly."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

from switokd.environment import Crew
from switokd.launch import processes_for
from switokd.runfile import load
from tests.support import process, run, unshare, wait_until

AUTO = ["placement=auto", "device=cpu"]
TRAIN = [sys.executable, "-m", "switokd", "train", "digits-1t1s", "run_dir=out"]
LARGE = """
import torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        if len(x) > 2:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of "
                "15.77 GiB of which 14.60 GiB is free.\\nSee documentation")
        return super().forward(x.flatten(1))
"""


def test_a_mistake_that_only_a_rank_finds_has_exit_code_2_and_one_line(tmp_path: Path) -> None:
    code, out, err = run([*TRAIN, "networks.student.model=wrn-9-1"], tmp_path)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("switokd: rank 1 (student): model wrn-9-1 cannot be made")


NAMELESS = """
import os, socket, sys
socket.sethostname("nowhere.invalid")
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_machines_own_name_need_not_lead_anywhere(tmp_path: Path) -> None:
    nameless = [*unshare("-ru"), sys.executable, "-c", NAMELESS]
    code, out, err = run([*nameless, *TRAIN, "schedule.max_steps=3"], tmp_path)
    assert code == 0, f"{out}\n{err}"


def test_a_gpu_without_memory_left_is_one_line(tmp_path: Path) -> None:
    """In the words that a GPU's allocator has for it; there is none here to fill."""
    (tmp_path / "large.py").write_text(LARGE)
    alone = ["placement=replicated", "coordinator=off", "networks.student.model=large:Net"]
    code, out, err = run([*TRAIN, *alone], tmp_path)
    assert (code, "epoch" in out) == (2, False)
    (line,) = err.splitlines()
    assert line.startswith("switokd: rank 0 (teacher, student): CUDA out of memory. Tried to ")
    assert "20.00 GiB; choose a smaller data.batch_size, compute.precision=bf16, or" in line


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, 4)]
)
def test_signals(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM to the launcher; SIGKILL to the student's rank."""
    log = tmp_path / "log"
    with process([*TRAIN, "schedule.epochs=500"], tmp_path, log) as child:
        record = tmp_path / "out" / "decisions.jsonl"
        wait_until(lambda: record.exists() and record.stat().st_size > 999, 60, "some steps")
        family = psutil.Process(child.pid).children(recursive=True)
        if number == signal.SIGKILL:
            (victim,) = [p for p in family if p.environ().get("RANK") == "1"]
            victim.kill()
        else:
            child.send_signal(number)
        assert child.wait(30) == code, log.read_text()
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        assert gone
    text = log.read_text()
    assert "Traceback" not in text
    if number == signal.SIGKILL:
        assert f"rank 1 (student), process {victim.pid}, was killed by SIGKILL" in text


@pytest.fixture
def twelve_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which PyTorch would use six: two of them are one of the processor's."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("switokd.launch.cores", lambda: 12)
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)


@pytest.mark.parametrize(
    ("settings", "crews"),
    [
        ([], ["12x1", "6x2", "3x4", "1x6"]),
        (["data.batch_size=8"], ["4x3", "2x6", "1x6"]),  # two images for each at least
        (["data.batch_size=2"], ["1x6"]),
        (["coordinator=off"], []),
        (["placement=replicated"], []),
    ],
)
@pytest.mark.usefixtures("twelve_cores")
def test_auto_may_choose_half_as_many_processes_and_so_on(
    settings: list[str], crews: list[str]
) -> None:
    config = load("digits-1t1s", [*AUTO, *settings])
    count, found = processes_for(config)
    assert [crew.code for crew in found] == crews
    assert [Crew.of(crew.code) for crew in found] == found
    assert count == (found[0].processes if found else 1)


@pytest.mark.usefixtures("twelve_cores")
def test_threads_that_the_user_has_set_are_every_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    count, found = processes_for(load("digits-1t1s", AUTO))
    assert (count, [crew.code for crew in found]) == (2, ["2x6", "1x6"])


@pytest.mark.usefixtures("twelve_cores")
def test_on_gpus_there_is_a_process_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switokd.world.gpu_count", lambda: 3)
    config = load("digits-1t1s", ["placement=auto"])
    assert processes_for(config) == (3, [])
    alone = load("digits-1t1s", ["placement=replicated", "coordinator=off"])
    assert processes_for(alone) == (1, [])
    assert processes_for(load("digits-1t1s", AUTO))[1]  # device=cpu
