"""If one process of a run is killed or hangs, the others end soon with a line that names it.

Where the launcher matters it is torchrun; otherwise the ranks are forked as by `switokd train`.
"""

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

from tests.preloaded import Forked, call, forked, train_ranks
from tests.support import lines, process, torchrun, wait_until

END_SECONDS = 30
SMALL = [f"networks.{teacher}.model=wrn-10-1" for teacher in ("teacher1", "teacher2")]
NETWORKS = {0: "teacher1", 1: "teacher2", 2: "student"}


@dataclass
class Running:
    """A 2T1S run that is training."""

    launcher: subprocess.Popen[str] | Forked
    ranks: dict[int, psutil.Process]
    coordinator: psutil.Process
    everyone: list[psutil.Process]
    """All processes of the run, including data loader processes."""
    log: Path


@contextmanager
def running(folder: Path, *settings: str, by_torchrun: bool = False) -> Iterator[Running]:
    """Start a run that would take minutes, and wait until it has decided ten steps."""
    log = folder / "log"
    words = ("digits-2t1s", "run_dir=out", "schedule.epochs=500", *SMALL, *settings)
    with (
        process(torchrun(3, *words), folder, log)
        if by_torchrun
        else forked(train_ranks, 3, words, cwd=folder, out=log)
    ) as child:
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
        family = psutil.Process(child.pid).children(recursive=True)
        ranks = {rank: member for member in family if (rank := rank_of(member)) is not None}
        assert sorted(ranks) == [0, 1, 2]
        (coordinator,) = (member for member in family if "coordinator" in member.cmdline())
        everyone = [psutil.Process(child.pid), *family]
        try:
            yield Running(child, ranks, coordinator, everyone, log)
        finally:  # includes processes whose parent has ended
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()


def rank_of(member: psutil.Process) -> int | None:
    """Return the rank of a process; None if it is not a rank."""
    if member.name().startswith("switokd rank "):  # forked: its command line is another process's
        return int(member.name().rpartition(" ")[2])
    return int(member.environ()["RANK"]) if "switokd.train" in member.cmdline() else None


def assert_all_end(run: Running, *, but: psutil.Process | None = None) -> None:
    waited = [process for process in run.everyone if process != but]
    run_ended = wait_until(lambda: all_ended(run, waited), END_SECONDS, "all processes ended")
    assert run_ended


def all_ended(run: Running, processes: list[psutil.Process]) -> bool:
    run.launcher.poll()  # so that it is no zombie
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def complaints(run: Running) -> list[str]:
    """Return the messages, without those about waits: a busy machine has more of them."""
    text = run.log.read_text()
    messages = [line for line in text.splitlines() if line.startswith("switokd: ")]
    return [line for line in messages if not re.search("waiting for|wait for it$", line)]


@pytest.mark.parametrize(("rank", "workers"), [(0, 0), (1, 1), (2, 0)])
def test_killing_a_rank_ends_the_run_and_names_it(rank: int, workers: int, tmp_path: Path) -> None:
    by_torchrun = rank == 0
    with running(tmp_path, f"data.workers={workers}", by_torchrun=by_torchrun) as run:
        # The launcher, three ranks, the coordinator, and the process that holds the store of forked
        # ranks; under torchrun one that draws the curves.
        assert (len(run.everyone) > 6) == (workers > 0)
        run.ranks[rank].kill()
        assert_all_end(run)
        named = f"rank {rank} ({NETWORKS[rank]}) went away after reporting step"
        others = [line for line in complaints(run) if named in line]
        assert others, run.log.read_text()
        own = [line for line in complaints(run) if line.startswith(f"switokd: rank {rank} ")]
        victim = f"rank {rank} ({NETWORKS[rank]}), process {run.ranks[rank].pid},"
        by_launcher = [f"switokd: {victim} was killed by SIGKILL"]
        assert own == ([] if by_torchrun else by_launcher)
        assert run.launcher.poll() != 0


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
    with running(tmp_path, by_torchrun=True) as run:
        run.coordinator.suspend()
        run.ranks[1].kill()
        wait_until(lambda: "signal SIGTERM" in run.log.read_text(), 10, "torchrun has noticed")
        run.coordinator.resume()
        assert_all_end(run)
        named = "rank 1 (teacher2) went away after reporting step"
        assert any(named in line for line in complaints(run)), run.log.read_text()


def test_killing_the_coordinator_ends_a_run_that_must_not_be_without_and_names_it(
    tmp_path: Path,
) -> None:
    with running(tmp_path, "coordinator.on_loss=stop") as run:
        run.coordinator.kill()
        assert_all_end(run)
        pattern = rf"the coordinator at [\d.:]+ \(process {run.coordinator.pid}\) went away at step"
        assert any(re.search(pattern, line) for line in complaints(run)), run.log.read_text()


def test_killing_torchrun_ends_the_run_and_names_it(tmp_path: Path) -> None:
    with running(tmp_path, by_torchrun=True) as run:
        run.launcher.kill()
        assert_all_end(run)
        assert any(
            f"the launcher (process {run.launcher.pid}) is gone" in line for line in complaints(run)
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

        def reasons() -> list[str]:
            ends = "no report of step|did not answer"
            return [line for line in complaints(run) if re.search(ends, line)]

        wait_until(reasons, END_SECONDS, "the reason")  # after a warning
        run.ranks[1].resume()
        assert_all_end(run)
        assert any("rank 1 (teacher2)" in line for line in reasons())


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
    words = ["digits-1t1s", "run_dir=out", "coordinator.timeout=3.0", "schedule.max_steps=20"]
    words += ["networks.teacher.model=silent:Teacher", f"networks.student.model=silent:{model}"]
    words.append(f"placement={placement}")
    code, _, text = call(tmp_path, train_ranks, 2, tuple(words), seconds=60)
    assert code == 4, text
    named = f"rank 1 ({who}) did not answer while the other ranks were {doing}: it hangs"
    assert named in text, text


def test_sigterm_ends_all_processes_and_keeps_the_decision_log(tmp_path: Path) -> None:
    with running(tmp_path, by_torchrun=True) as run:
        run.launcher.send_signal(signal.SIGTERM)
        assert_all_end(run)
        decision_log = tmp_path / "out" / "decisions.jsonl"
        assert lines(decision_log)
        assert not (tmp_path / "out" / "summary.json").exists()


def test_a_diverging_network_is_named_once_with_exit_code_3(tmp_path: Path) -> None:
    words = ("digits-2t1s", "networks.teacher2.optimizer.lr=1e30", "run_dir=out")
    code, _, text = call(tmp_path, train_ranks, 3, words)
    assert code == 3, text
    messages = [line for line in text.splitlines() if line.startswith("switokd: ")]
    assert len(messages) == 1, text
    assert "network teacher2 (rank 1) has logits that are not finite at step" in messages[0]
    decisions = lines(tmp_path / "out" / "decisions.jsonl")
    for line in decisions:
        assert all(json.dumps(line[k]) not in ("NaN", "Infinity") for k in ("gap", "e_s", "e_t"))
