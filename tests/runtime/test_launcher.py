"""`switokd train` as a launcher: exit codes and error messages.

Not covered: waiting for ranks without a training (`test_fork.py`); torchrun (`test_faults.py`).
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from switokd.cli.main import app
from tests.preloaded import call, switokd_command
from tests.support import process, run, torchrun, unshare, wait_until

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
    code, out, err = run([*TRAIN, "networks.student.model_kwargs={nope: 1}"], tmp_path)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("switokd: rank 1 (student): networks.student: model wrn-10-1 cannot be")


NAMELESS = """
import os, socket, sys
socket.sethostname("nowhere.invalid")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("launcher", ["switokd train", "torchrun"])
def test_a_machines_own_name_need_not_lead_anywhere(launcher: str, tmp_path: Path) -> None:
    command = TRAIN
    if launcher == "torchrun":  # with what README says that it needs then
        program, *words = torchrun(2, "digits-1t1s", "run_dir=out")
        command = [program, "--local-addr=127.0.0.1", *words]
    nameless = [*unshare("-ru"), sys.executable, "-c", NAMELESS]
    code, out, err = run([*nameless, *command, "schedule.max_steps=3"], tmp_path)
    assert code == 0, f"{out}\n{err}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["networks.teacher.ranks=40"], "64 images leave a rank of teacher (ranks 0-39) fewer"),
        (["placement=replicated", "data.batch_size=4", "-n3"], "4 images leave a rank of teacher"),
        (["placement=replicated", "coordinator=off", "-n2"], "off is for a run of one process, fo"),
    ],
)
def test_what_the_run_file_tells_is_refused_before_any_process_starts(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr("switokd.cli.train._launch", lambda *what: started.append(what))
    result = CliRunner().invoke(app, ["train", "digits-1t1s", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not started


def test_under_torchrun_its_processes_count_not_those_that_would_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes of torchrun on a machine with eight GPUs: 12 images are enough."""
    variables = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    for key, value in variables.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    monkeypatch.setattr("switokd.runtime.device.gpu_count", lambda: 8)
    worked: list[object] = []
    monkeypatch.setattr("switokd.cli.worker.run_rank", lambda *what: worked.append(what))
    settings = ["placement=replicated", "data.batch_size=12"]
    result = CliRunner().invoke(app, ["train", "digits-1t1s", *settings])
    assert result.exit_code == 0, result.stderr
    assert worked == [("digits-1t1s", settings)]


def test_a_gpu_without_memory_left_is_one_line(tmp_path: Path) -> None:
    """The model raises the error of a GPU's allocator; this machine may have no GPU."""
    (tmp_path / "large.py").write_text(LARGE)
    alone = ["placement=replicated", "coordinator=off", "networks.student.model=large:Net"]
    code, out, err = call(tmp_path, switokd_command, "train", "digits-1t1s", "run_dir=out", *alone)
    assert (code, "epoch" in out) == (2, False)
    (line,) = err.splitlines()
    assert line.startswith("switokd: rank 0 (teacher, student): CUDA out of memory. Tried to ")
    assert "20.00 GiB; choose a smaller data.batch_size, compute.precision=bf16, more " in line
    assert line.endswith(", or compute.cuda_graphs=false")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, 4)]
)
def test_signals(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM go to the launcher, SIGKILL to the rank of the student."""
    log = tmp_path / "log"
    command = [*TRAIN, "schedule.epochs=500", "--max-restarts=0"]
    with process(command, tmp_path, log) as child:
        decision_log = tmp_path / "out" / "decisions.jsonl"
        wait_until(
            lambda: decision_log.exists() and decision_log.stat().st_size > 999, 60, "some steps"
        )
        family = psutil.Process(child.pid).children(recursive=True)
        if number == signal.SIGKILL:
            (victim,) = [p for p in family if p.name() == "switokd rank 1"]
            victim.kill()
        else:
            child.send_signal(number)
        assert child.wait(30) == code, log.read_text()
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        assert gone
    text = log.read_text()
    assert "Traceback" not in text
    said = "interrupted; there is no checkpoint yet; start again with: switokd train --resume out"
    assert (said in text) is (number == signal.SIGINT)
    if number == signal.SIGKILL:
        assert f"rank 1 (student), process {victim.pid}, was killed by SIGKILL" in text


@pytest.mark.parametrize(
    "victim", ["the launcher", "the process that started the ranks", "torchrun"]
)
def test_a_stopped_rank_outlives_neither_its_launcher_nor_its_parent(
    victim: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    command = [*TRAIN, "schedule.epochs=500", "--max-restarts=0"]
    if victim == "torchrun":
        command = torchrun(2, *TRAIN[TRAIN.index("train") + 1 :], "schedule.epochs=500")
    with process(command, tmp_path, log) as child:
        decision_log = tmp_path / "out" / "decisions.jsonl"
        wait_until(lambda: decision_log.exists() and decision_log.stat().st_size, 60, "a step")
        family = psutil.Process(child.pid).children(recursive=True)
        stopped = [p for p in family if _is_rank(p, victim)]
        assert len(stopped) == 2
        try:
            for rank in stopped:
                rank.suspend()
            if victim != "the process that started the ranks":
                child.kill()
            else:
                psutil.Process(stopped[0].ppid()).kill()
            _, alive = psutil.wait_procs(family, timeout=5)
            # Process 1 may take longer to reap them.
            assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
        finally:
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
        expected = 4 if victim == "the process that started the ranks" else -9
        assert child.wait(10) == expected, log.read_text()


def _is_rank(process: psutil.Process, launcher: str) -> bool:
    if launcher == "torchrun":
        return "switokd.train" in process.cmdline()
    return process.name().startswith("switokd rank ")
