"""If one process of a run is killed or hangs, the others end soon with a line that names it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support import lines, process, torchrun, wait_until

END_SECONDS = 30
NETWORKS = {0: "teacher1", 1: "teacher2", 2: "student"}


@dataclass
class Running:
    """A 2T1S run that is training."""

    torchrun: subprocess.Popen[str]
    ranks: dict[int, psutil.Process]
    coordinator: psutil.Process
    everyone: list[psutil.Process]
    """All processes of the run, including data loader processes."""
    log: Path


@contextmanager
def running(folder: Path, *settings: str) -> Iterator[Running]:
    """Start a run that would take minutes, and wait until it has decided ten steps."""
    log = folder / "log"
    command = torchrun(3, "digits-2t1s", "run_dir=out", "schedule.epochs=500", *settings)
    with process(command, folder, log) as child:
        decision_log = folder / "out" / "decisions.jsonl"
        wait_until(
            lambda: (
                child.poll() is not None
                or (decision_log.exists() and len(lines(decision_log)) > 20)
            ),
            60,
            "ten steps",
        )
        assert child.poll() is None, log.read_text()
        ranks, coordinators = {}, []
        family = psutil.Process(child.pid).children(recursive=True)
        for member in family:
            words = member.cmdline()
            if "coordinator" in words:
                coordinators.append(member)
            elif "switokd.train" in words:
                ranks[int(member.environ()["RANK"])] = member
        assert sorted(ranks) == [0, 1, 2]
        (coordinator,) = coordinators
        everyone = [psutil.Process(child.pid), *family]
        try:
            yield Running(child, ranks, coordinator, everyone, log)
        finally:  # includes processes whose parent has ended
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()


def assert_all_end(run: Running, *, but: psutil.Process | None = None) -> None:
    waited = [process for process in run.everyone if process != but]
    run_ended = wait_until(lambda: all_ended(run, waited), END_SECONDS, "all processes ended")
    assert run_ended


def all_ended(run: Running, processes: list[psutil.Process]) -> bool:
    run.torchrun.poll()  # so that it is no zombie
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def complaints(run: Running) -> list[str]:
    return [line for line in run.log.read_text().splitlines() if line.startswith("switokd: ")]


@pytest.mark.parametrize(("rank", "workers"), [(0, 0), (1, 1), (2, 0)])
def test_killing_a_rank_ends_the_run_and_names_it(rank: int, workers: int, tmp_path: Path) -> None:
    with running(tmp_path, f"data.workers={workers}") as run:
        # torchrun, three ranks, the coordinator, and the process that draws the curves
        assert (len(run.everyone) > 6) == (workers > 0)
        run.ranks[rank].kill()
        assert_all_end(run)
        named = f"rank {rank} ({NETWORKS[rank]}) went away after reporting step"
        others = [line for line in complaints(run) if named in line]
        assert others, run.log.read_text()
        assert not any(line.startswith(f"switokd: rank {rank} ") for line in others)
        assert run.torchrun.returncode != 0


@pytest.mark.parametrize(
    "placement",
    ["replicated", "{teacher1: [0, 1], teacher2: [1, 2], student: [2]}"],
    ids=["replicated", "table"],
)
def test_killing_one_of_a_networks_ranks_ends_the_run_and_names_it(
    placement: str, tmp_path: Path
) -> None:
    with running(tmp_path, f"placement={placement}") as run:
        run.ranks[1].kill()
        assert_all_end(run)
        names = r"\(teacher1, teacher2(, student)?\)"
        pattern = rf"rank 1 {names} went away after reporting step"
        assert any(re.search(pattern, line) for line in complaints(run)), run.log.read_text()


def test_the_lost_rank_is_named_after_torchruns_sigterm_too(tmp_path: Path) -> None:
    """On a busy machine torchrun may notice the loss before the coordinator."""
    with running(tmp_path) as run:
        run.coordinator.suspend()
        run.ranks[1].kill()
        wait_until(lambda: "signal SIGTERM" in run.log.read_text(), 10, "torchrun has noticed")
        run.coordinator.resume()
        assert_all_end(run)
        named = "rank 1 (teacher2) went away after reporting step"
        assert any(named in line for line in complaints(run)), run.log.read_text()


def test_killing_the_coordinator_ends_the_run_and_names_it(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.coordinator.kill()
        assert_all_end(run)
        pattern = rf"the coordinator at [\d.:]+ \(process {run.coordinator.pid}\) went away at step"
        assert any(re.search(pattern, line) for line in complaints(run)), run.log.read_text()


def test_killing_torchrun_ends_the_run_and_names_it(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.torchrun.kill()
        assert_all_end(run)
        assert any(
            f"the launcher (process {run.torchrun.pid}) is gone" in line for line in complaints(run)
        )


@pytest.mark.parametrize("seconds", [0.7, 3.0])
def test_killing_torchrun_during_the_start_ends_all_ranks(seconds: float, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(torchrun(2, "digits-1t1s", "schedule.epochs=500"), tmp_path, log) as child:
        parent = psutil.Process(child.pid)
        ranks = wait_until(lambda: len(parent.children()) == 2 and parent.children(), 30, "ranks")
        try:
            born = max(rank.create_time() for rank in ranks)
            wait_until(lambda: time.time() - born > seconds, 10, "the moment to kill")
            child.kill()
            _, alive = psutil.wait_procs(ranks, timeout=END_SECONDS)
            assert not alive
        finally:
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.kill()
    assert f"the launcher (process {child.pid}) is gone" in log.read_text()


def test_a_hanging_rank_is_named_after_the_timeout(tmp_path: Path) -> None:
    with running(tmp_path, "coordinator.timeout=4.0") as run:
        run.ranks[1].suspend()
        wait_until(lambda: complaints(run), END_SECONDS, "a complaint")
        run.ranks[1].resume()  # torchrun waits for this rank before it ends
        assert_all_end(run)
        assert any(
            "rank 1 (teacher2)" in line and re.search("no report of step|did not answer", line)
            for line in complaints(run)
        )


# NCCL's collectives wait in a GPU's queue, and raise no error if a rank hangs. Imitate that.
SILENT = """
import os
import threading
from dataclasses import replace
from torch import nn
from switokd.runtime.process_group import PATIENCE, World

group = World.group
World.is_silent = property(lambda self: True)
World.group = lambda self, ranks: group(replace(self, timeout=PATIENCE), ranks)

class Teacher(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        return super().forward(x.flatten(1))

def for_ever(*_):
    threading.Event().wait()

class Student(Teacher):
    hangs_in = "forward"
    steps = 0

    def forward(self, x):
        self.steps += self.training
        z = super().forward(x)
        if self.steps == 5 and os.environ["RANK"] == "1":
            if self.hangs_in == "backward":
                z.register_hook(for_ever)
            else:
                for_ever()
        return z

class Replicated(Student):
    hangs_in = "backward"
"""


@pytest.mark.parametrize(
    ("model", "placement", "who", "doing"),
    [
        ("Student", "dedicated", "student", "exchanging the logits of step 5"),
        ("Replicated", "replicated", "teacher, student", "adding up the gradients of step 5"),
    ],
)
def test_a_hanging_rank_is_named_if_no_collective_fails(
    model: str, placement: str, who: str, doing: str, tmp_path: Path
) -> None:
    (tmp_path / "silent.py").write_text(SILENT)
    log, words = tmp_path / "log", ["coordinator.timeout=3.0", "schedule.max_steps=20"]
    words += ["networks.teacher.model=silent:Teacher", f"networks.student.model=silent:{model}"]
    words.append(f"placement={placement}")
    with process(torchrun(2, "digits-1t1s", *words, "run_dir=out"), tmp_path, log) as child:
        assert child.wait(60) != 0
    text = log.read_text()
    named = f"rank 1 ({who}) did not answer while the other ranks were {doing}: it hangs"
    assert named in text, text
    assert re.search(r"exitcode\s*: 4 ", text)


def test_sigterm_ends_all_processes_and_keeps_the_decision_log(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.torchrun.send_signal(signal.SIGTERM)
        assert_all_end(run)
        decision_log = tmp_path / "out" / "decisions.jsonl"
        assert lines(decision_log)
        assert not (tmp_path / "out" / "summary.json").exists()


def test_a_killed_loader_process_is_named(tmp_path: Path) -> None:
    with running(tmp_path, "data.workers=1") as run:
        loaders = [
            child
            for child in run.ranks[2].children(recursive=True)
            if any("forkserver" in word or "spawn" in word for word in child.cmdline())
            and not child.children()
        ]
        victim = loaders[-1]
        victim.kill()
        assert_all_end(run)
        assert any(
            f"rank 2 (student): data loader process {victim.pid} is gone" in line
            for line in complaints(run)
        ), run.log.read_text()


def test_a_diverging_network_is_named_once_with_exit_code_3(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = ["networks.teacher2.optimizer.lr=1e30", "run_dir=out"]
    with process(torchrun(3, "digits-2t1s", *settings), tmp_path, log) as child:
        assert child.wait(90) != 0
    text = log.read_text()
    messages = [line for line in text.splitlines() if line.startswith("switokd: ")]
    assert len(messages) == 1, text
    assert "network teacher2 (rank 1) has logits that are not finite at step" in messages[0]
    assert re.search(r"exitcode\s*: 3 ", text)
    decisions = lines(tmp_path / "out" / "decisions.jsonl")
    for line in decisions:
        assert all(json.dumps(line[k]) not in ("NaN", "Infinity") for k in ("gap", "e_s", "e_t"))
