"""The commands that tell a run what to do, each against a real run and its coordinator.

Not covered: what commands change in the bits of a run (`tests/training/test_commanded_runs.py`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer

from switokd.cli.finding import Found
from switokd.cli.tell import _check_goes_on, checkpoint
from switokd.errors import UsageError
from switokd.runs.checkpoints import stored
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.coordination.test_lost_coordinator import coordinator
from tests.preloaded import call, switokd_command
from tests.services.test_coordinator import plan
from tests.support import process
from tests.training.test_commanded_runs import running


@dataclass
class Idle:
    """A run that has joined a coordinator, and takes no command: none of its ranks is there."""

    folder: Path
    run_id: str
    address: str

    def told(self, *words: str) -> tuple[int, str, str]:
        return call(self.folder, switokd_command, *words)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Idle]:
    folder, secret = tmp_path_factory.mktemp("idle"), b"0123456789abcdef"
    (folder / "out").mkdir()
    (folder / "out" / "config.yaml").touch()
    with coordinator(None) as served, grpc.insecure_channel(served.address) as channel:
        request = pb.JoinRequest(run_id="idle-1", rank=0, plan=plan(), secret=secret)
        pb_grpc.CoordinatorServiceStub(channel).Join(request, wait_for_ready=True, timeout=10)
        identity = {"run_id": "idle-1", "epoch": 0, "coordinator": served.address}
        identity["secret"] = secret.hex()
        (folder / "out" / "run.json").write_text(json.dumps(identity))
        yield Idle(folder, "idle-1", served.address)


def test_a_run_is_told_what_to_do(tmp_path: Path) -> None:
    """A run with the coordinator that it has started itself."""
    with running(tmp_path, "auto", "schedule.epochs=1000") as run:
        run.wait_for_step(5)

        def told(*words: str) -> str:
            code, out, err = call(tmp_path, switokd_command, *words)
            assert (code, err) == (0, "")
            return out

        out = told("hold", "out", "teacher1", "expert", "--until-step", "900000")
        assert out.startswith("hold of teacher1 in expert mode until step 900000: from step ")
        assert told("scale", "out", "2", "teacher2").startswith("scale of 2 for teacher2: from")
        assert told("release", "out", "teacher1").startswith("release of teacher1: from step ")
        saved = int(told("checkpoint", "out").removeprefix("checkpoint: saved after step "))
        noted = run.noted(4)
        assert [line["action"] for line in noted] == ["hold", "scale", "release", "checkpoint"]
        assert noted[-1]["first_step"] == saved + 1
        shown = json.loads(told("status", "out", "--json"))["commands"]
        steps = [command["first_step"] for command in shown]
        assert steps == [line["first_step"] for line in noted]

        run.rank(2).suspend()
        out = told("scale", "out", "1", "--wait", "0")
        assert out.startswith("scale of 1 for all teachers: sent as ")
        run.rank(2).resume()
        out = told("stop", "out")
        assert out.endswith("; continue with: switokd train --resume out\n")
        assert run.child.wait(60) == 6, run.log
    last = int(re.findall(r"after step (\d+);", out)[0])
    assert last in {checkpoint.step for checkpoint in stored(run.out)}
    assert [line["action"] for line in run.noted(6)[-2:]] == ["scale", "stop"]
    code, out, err = call(tmp_path, switokd_command, "stop", "out")
    assert (code, out) == (2, "")
    assert "out: the run does not go on: it was interrupted or stopped; after" in err


def test_a_run_that_has_ended_takes_no_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/config.yaml").write_text("networks: {}")
    Path("out/summary.json").write_text('{"networks": {}}')
    step = {"teacher": "t", "student": "s", "gap": 1.0, "delta": 0.5, "mode": "expert"}
    Path("out/decisions.jsonl").write_text(json.dumps({"step": 1234, **step}) + "\n")
    with pytest.raises(typer.Exit) as caught:
        checkpoint("out")
    assert caught.value.exit_code == 2
    said = "switokd: out: the run has finished, after step 1,234; it takes no commands\n"
    assert capsys.readouterr().err == said
    for state, words in (
        ("finished", "r: the run has finished, after step 7; it takes no commands"),
        ("stopped", "it was stopped (rank 1 was lost); after 'switokd train --resume RUN' it"),
        ("failed", "it has failed (rank 1 was lost); after 'switokd train --resume RUN' it"),
    ):
        view = {"state": state, "last_step": 7, "folder": None, "failure": "rank 1 was lost"}
        with pytest.raises(UsageError, match=re.escape(words)):
            _check_goes_on("r", Found("r", "127.0.0.1:1", None, view))
    _check_goes_on("r", Found("r", "127.0.0.1:1", None, {**view, "state": "training"}))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["hold", "out", "s", "expert"], 2, "'s' is no teacher of this run: it has t (INVALID_"),
        (["release", "out", "t3"], 2, "'t3' is no teacher"),
        (["scale", "out", "0"], 2, "scale: factor: found 0; allowed: a number, 1e-06 to 1e+06"),
        (["scale", "out", "-0.5"], 2, "scale: found -0.5, a number below 0; see"),
        (["scale", "out", "nan"], 2, "1e-06 to 1e+06"),
        (["stop", "idle-1"], 2, "only an operator, or who has the run's secret"),
        (["drain"], 2, "only an operator may"),
        (["drain", "--coordinator", "a:1,b:1"], 2, "a:1,b:1: name the one to drain"),
        (["stop", "out", "--coordinator", "127.0.0.1:1"], 4, "no coordinator at 127.0.0.1:1"),
        (["stop", "out", "--wait", "0.5"], 4, "not taken the command within 0.5 s (--wait); it"),
    ],
)
def test_a_refusal_is_one_line(idle: Idle, words: list[str], code: int, said: str) -> None:
    more = [] if "--coordinator" in words else ["--coordinator", idle.address]
    found, out, err = idle.told(*words, *more)
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1


def test_an_operators_token_commands_any_run_and_drains(tmp_path: Path) -> None:
    token = "an-operators-token-of-the-tests"
    (tmp_path / "token").write_text(f"{token}\n")
    command = [sys.executable, "-m", "switokd", "coordinator", "--port", "0", "--http-port", "0"]
    with process([*command, "--operator-token-file", "token"], tmp_path) as child:
        assert child.stdout is not None
        address = json.loads(child.stdout.readline())["grpc"]
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.CoordinatorServiceStub(channel)
            request = pb.JoinRequest(run_id="r-1", rank=0, plan=plan(), secret=b"0123456789abcdef")
            stub.Join(request, timeout=10)

        def told(*words: str, **env: Any) -> tuple[int, str, str]:
            more = ("--coordinator", address)
            return call(tmp_path, switokd_command, *words, *more, **env)

        hold = ("hold", "r-1", "t", "expert", "--wait", "0")
        code, out, err = told(*hold, SWITOKD_TOKEN="another-token-of-the-tests")
        assert (code, out) == (2, "")
        assert "the token is not one of this coordinator's" in err
        code, out, err = told(*hold, SWITOKD_TOKEN=token)
        assert (code, err) == (0, "")
        code, out, err = told("status", "r-1", "--json", SWITOKD_TOKEN_FILE="token")
        (given,) = json.loads(out)["commands"]
        assert given["arguments"]["teacher"] == "t"
        code, out, err = told("runs", "--json", "--token-file", "none")
        assert (code, out) == (2, "")
        assert "runs: --token-file: none cannot be read: No such file or directory" in err
        code, out, err = told("runs", "--json", "--token-file", "token", SWITOKD_TOKEN="another")
        assert (code, err, len(json.loads(out)["runs"])) == (0, "", 1)
        code, out, err = told("drain")
        assert (code, out) == (2, "")
        assert child.poll() is None
        code, out, err = told("drain", SWITOKD_TOKEN=token)
        assert (code, err) == (0, "")
        assert out == f"the coordinator at {address} stops; it had 0 open streams\n"
        assert child.wait(20) == 0
