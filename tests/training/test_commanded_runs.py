"""Runs that are given commands: the record shows them, and they end in the bits of other runs.

Real ranks, real coordinators. An undisturbed run with the same commands.jsonl says what must come
out. Not covered: the commands of the command line (`tests/cli/test_tell.py`).
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from switokd.runs.checkpoints import stored
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.coordination.test_lost_coordinator import RESULTS, WORDS, coordinator
from tests.preloaded import Forked, call, forked, switokd_command, train_ranks
from tests.support import lines, process, switokd_train, torchrun, wait_until

SHORT = "schedule.epochs=2"
"""120 steps."""
HOLD = pb.Command(
    command_id="hold", hold=pb.Hold(teacher="teacher1", mode=pb.MODE_EXPERT, until_step=100)
)
SCALE = pb.Command(command_id="scale", scale_threshold=pb.ScaleThreshold(factor=0.5))


class Run:
    """A run of three ranks in `folder`/out, and its coordinator's address."""

    def __init__(self, folder: Path, child: Forked | subprocess.Popen[str], address: str) -> None:
        self.folder, self.child, self.address = folder, child, address
        self.out = folder / "out"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait_for_step(self, step: int) -> None:
        record = self.out / "decisions.jsonl"
        wait_until(
            lambda: (
                self.child.poll() is not None
                or (record.exists() and record.read_text().count("\n") // 2 >= step)
            ),
            60,
            f"step {step}",
        )
        assert self.child.poll() is None, self.log

    def send(self, command: pb.Command) -> None:
        identity = json.loads((self.out / "run.json").read_text())
        request = pb.SendCommandRequest(
            run_id=identity["run_id"], command=command, secret=bytes.fromhex(identity["secret"])
        )
        with grpc.insecure_channel(self.address) as channel:
            stub = pb_grpc.CoordinatorServiceStub(channel)
            stub.SendCommand(request, timeout=10, wait_for_ready=True)

    def status(self) -> pb.GetRunStatusResponse:
        identity = json.loads((self.out / "run.json").read_text())
        with grpc.insecure_channel(self.address) as channel:
            stub = pb_grpc.CoordinatorServiceStub(channel)
            request = pb.GetRunStatusRequest(run_id=identity["run_id"])
            try:
                return stub.GetRunStatus(request, timeout=10, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:  # it has not joined again yet
                    return pb.GetRunStatusResponse()
                raise

    def statuses(self) -> dict[str, pb.CommandStatus]:
        status = self.status()
        return {status.command.command_id: status for status in status.commands}

    def taken(self, command_id: str) -> int:
        """Wait until the coordinator knows that a command was taken; return its first step."""

        def first_step() -> int:
            found = self.statuses().get(command_id)
            return int(found.first_step) if found else 0

        return int(wait_until(first_step, 30, f"{command_id} is taken"))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no step end in the block: its calls may take long on a busy machine."""
        rank = self.rank(2)
        rank.suspend()
        yield
        rank.resume()

    def give(self, *commands: pb.Command) -> int:
        """Send commands and wait until the run has taken them; return the last one's first step."""
        path = self.out / "commands.jsonl"
        before = len(lines(path)) if path.exists() else 0
        with self.paused():
            for command in commands:
                self.send(command)
        number = before + len({command.command_id for command in commands})
        return int(self.noted(number)[-1]["first_step"])

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank."""
        family = psutil.Process(self.child.pid).children()
        return next(p for p in family if p.name() == f"switokd rank {number}")

    def noted(self, number: int) -> list[dict[str, Any]]:
        """Wait until so many commands are in the run folder; return them."""
        path = self.out / "commands.jsonl"
        wait_until(lambda: path.exists() and len(lines(path)) >= number, 30, f"{number} commands")
        return lines(path)


@contextmanager
def running(folder: Path, address: str, *words: str, processes: int = 3) -> Iterator[Run]:
    arguments = (*WORDS, "run_dir=out", f"coordinator.address={address}", *words)
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    with forked(train_ranks, processes, arguments, cwd=folder, out=log) as child:
        yield Run(folder, child, address)


def same_with(commands: Path, folder: Path, *words: str) -> Path:
    """Train without a disturbance, with these commands given in advance."""
    (folder / "out").mkdir(parents=True)
    shutil.copy(commands, folder / "out")
    code, out, err = call(folder, train_ranks, 3, (*WORDS, "run_dir=out", *words))
    assert code == 0, f"{out}\n{err}"
    return folder / "out"


def assert_same_bits(one: Path, other: Path) -> None:
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def held(out: Path, teacher: str) -> list[int]:
    """Return the steps in which a teacher was held; each must be in expert mode."""
    found = [line for line in lines(out / "decisions.jsonl") if line.get("held")]
    assert {line["mode"] for line in found} <= {"expert"}
    return [line["step"] for line in found if line["teacher"] == teacher]


def scaled(out: Path) -> dict[int, float]:
    found = [line for line in lines(out / "decisions.jsonl") if "delta_scale" in line]
    return {line["step"]: line["delta_scale"] for line in found}


def test_commands_in_the_middle_of_a_run(tmp_path: Path) -> None:
    with (
        coordinator(tmp_path / "journal.db") as served,
        running(tmp_path / "run", served.address, SHORT) as run,
    ):
        run.wait_for_step(20)
        first = run.give(HOLD, HOLD)  # the repetition changes nothing
        scale_first = run.give(SCALE)
        ends = pb.Command(command_id="end", scale_threshold=pb.ScaleThreshold(factor=1.0))
        scale_end = run.give(ends)
        assert run.child.wait(90) == 0, run.log
        statuses = run.statuses()
    assert [s.first_step for s in statuses.values()] == [first, scale_first, scale_end]
    out = run.out
    assert held(out, "teacher1") == list(range(first, 101))
    assert held(out, "teacher2") == []
    assert scaled(out) == dict.fromkeys(range(scale_first, scale_end), 0.5)
    noted = lines(out / "commands.jsonl")
    assert [line["id"] for line in noted] == ["hold", "scale", "end"]
    assert [line["first_step"] for line in noted] == [first, scale_first, scale_end]
    assert {line["asked_by"] for line in noted} == {"run"}
    assert 20 < first < 100
    run_id = json.loads((out / "run.json").read_text())["run_id"]
    for words in (["out"], [run_id, "--journal", str(tmp_path / "journal.db")]):
        code, text, err = call(tmp_path / "run", switokd_command, "replay", *words)
        assert code == 0, f"{text}\n{err}"
    assert_same_bits(out, same_with(out / "commands.jsonl", tmp_path / "same", SHORT))


def test_a_run_is_stopped_killed_and_continued_under_commands(tmp_path: Path) -> None:
    """From its last checkpoint, and from one that is older than the commands."""
    often = ["checkpoint.every_steps=10", "checkpoint.keep=100", "resume=auto", SHORT]
    with coordinator(None) as served:
        with running(tmp_path / "run", served.address, *often) as run:
            run.wait_for_step(24)
            first = run.give(HOLD)
            save = pb.Command(command_id="save", save_checkpoint=pb.SaveCheckpoint())
            saved_after = run.give(save) - 1
            run.give(pb.Command(command_id="stop", stop=pb.Stop()))
            assert run.child.wait(60) == 6, run.log
        noted = run.noted(3)
        stopped_after = noted[2]["first_step"] - 1
        (line,) = (found for found in run.log.splitlines() if found.startswith("switokd: stopped"))
        assert line == (
            f"switokd: stopped after step {stopped_after} by a command of somebody with the run's "
            "secret; continue with: switokd train --resume out"
        )
        assert {saved_after, stopped_after} <= {c.step for c in stored(run.out)}
        record = lines(run.out / "decisions.jsonl")
        assert record[-1]["step"] == stopped_after

        older = tmp_path / "older"
        shutil.copytree(tmp_path / "run", older)
        for checkpoint in stored(older / "out"):
            if checkpoint.step >= first:
                shutil.rmtree(checkpoint.path)
        before = stored(older / "out")[0].step
        assert before < first
        with running(tmp_path / "run", served.address, *often) as run:
            run.wait_for_step(stopped_after + 15)
            run.give(SCALE)
            run.rank(1).kill()
            assert run.child.wait(60) == 4, run.log
        with running(tmp_path / "run", served.address, *often) as run:
            assert run.child.wait(90) == 0, run.log
    assert len(run.noted(4)) == 4
    assert_same_bits(run.out, same_with(run.out / "commands.jsonl", tmp_path / "same", SHORT))
    shutil.copy(run.out / "commands.jsonl", older / "out")
    code, out, err = call(older, train_ranks, 3, (*WORDS, SHORT, "run_dir=out", "resume=auto"))
    assert code == 0, f"{out}\n{err}"
    assert f"after step {before} of" in out
    assert_same_bits(run.out, older / "out")


def test_the_coordinator_is_lost_while_commands_wait(tmp_path: Path) -> None:
    with coordinator(None) as served, running(tmp_path / "run", served.address) as run:
        port = served.port
        run.wait_for_step(20)
        with run.paused():
            run.send(HOLD)
            served.child.terminate()  # what waits to be sent is sent before
            served.child.wait(20)
        first = run.noted(1)[0]["first_step"]  # taken by ranks that decide alone
        journal = tmp_path / "journal.db"
        with ExitStack() as stack:
            with run.paused():
                again = stack.enter_context(coordinator(journal, port))
            assert run.taken("hold") == first  # the ranks have told it
            assert run.statuses()["hold"].command.hold == HOLD.hold
            with run.paused():
                run.rank(0).suspend()
                run.send(SCALE)
                wait_until(lambda: "scale" in journalled(journal), 20, "the journal has it")
                again.child.kill()
                again.child.wait(20)
                stack.enter_context(coordinator(journal, port))
                run.rank(0).resume()
            scale_first = run.taken("scale")
            assert list(run.statuses()) == ["hold", "scale"]
            assert run.child.wait(90) == 0, run.log
    assert held(run.out, "teacher1") == list(range(first, 101))
    assert list(scaled(run.out)) == list(range(scale_first, max(scaled(run.out)) + 1))
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["steps_decided_alone"] > 0
    assert_same_bits(run.out, same_with(run.out / "commands.jsonl", tmp_path / "same"))


def journalled(journal: Path) -> list[str]:
    with closing(sqlite3.connect(journal)) as connection:
        return [name for (name,) in connection.execute("SELECT id FROM commands")]


def test_one_process_refuses_what_it_cannot_do_and_stops(tmp_path: Path) -> None:
    words = ["placement=replicated", "distillation.strategy=dml", "checkpoint.keep=0"]
    words += ["checkpoint.every_steps=null", "schedule.epochs=100"]
    with (
        coordinator(None) as served,
        running(tmp_path, served.address, *words, processes=1) as run,
    ):
        run.wait_for_step(5)
        run.send(HOLD)
        run.send(pb.Command(command_id="save", save_checkpoint=pb.SaveCheckpoint()))
        run.send(pb.Command(command_id="stop", stop=pb.Stop()))
        assert run.child.wait(60) == 6, run.log
        statuses = run.statuses()
        assert run.status().state == pb.RUN_STATE_STOPPED
    assert statuses["hold"].failure == "its strategy dml pauses no teacher"
    assert statuses["save"].failure == "with checkpoint.keep=0 it saves none"
    assert statuses["stop"].first_step > 5
    assert [line["id"] for line in run.noted(1)] == ["stop"]
    assert "there is no checkpoint; start again with: switokd train --resume out" in run.log


@pytest.mark.parametrize("launcher", ["switokd train", "torchrun"])
def test_no_launcher_starts_a_stopped_run_again(launcher: str, tmp_path: Path) -> None:
    """torchrun starts its ranks again after every exit code but 0."""
    words = ["digits-1t1s", "schedule.epochs=1000", "run_dir=out", "data.workers=0"]
    words += [f"networks.{name}.model=wrn-10-1" for name in ("teacher", "student")]
    command = switokd_train(2, *words)
    if launcher == "torchrun":
        program, *rest = torchrun(2, *words, "resume=auto")
        command = [program, "--max-restarts=2", *rest]
    log = tmp_path / "log"
    with process(command, tmp_path, log) as child:
        run = Run(tmp_path, child, "")
        run.wait_for_step(3)
        run.address = json.loads((run.out / "run.json").read_text())["coordinator"]
        run.send(pb.Command(command_id="stop", stop=pb.Stop()))
        assert child.wait(60) == (0 if launcher == "torchrun" else 6), run.log
    last = run.noted(1)[0]["first_step"] - 1
    assert f"stopped after step {last} by a command of somebody with the run's secret" in run.log
    assert len(lines(run.out / "attempts.jsonl")) == 1, "it was started once"
