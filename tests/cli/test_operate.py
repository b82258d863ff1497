"""The commands `runs`, `status` and `watch` against real coordinators, ranks and run folders.

Not covered: what the coordinator answers in every case (`tests/services/test_views.py`).
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from switokd.v1 import coordinator_pb2 as pb
from tests import preloaded
from tests.services.test_coordinator import Server, plan
from tests.services.test_views import EXPERT, LEARNING, coordinator, finish, train
from tests.support import REPOSITORY, environment, free_port, process, run, wait_until

SWITOKD = [sys.executable, "-m", "switokd"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("operate")
    options = ("--journal", "journal.db", "--forget-after", "1")
    with coordinator(folder, *options) as started:
        yield started


def named(server: Server, run_id: str) -> str:
    """A run with this id, joined by both ranks."""
    for rank in (0, 1):
        server.stub.Join(pb.JoinRequest(run_id=run_id, rank=rank, plan=plan()))
    return run_id


def switokd(folder: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    return run([*SWITOKD, *arguments], folder, 60, **env)


def asked(server: Server, folder: Path, *arguments: str) -> str:
    """What a command that succeeds prints about the runs of a coordinator."""
    code, out, err = switokd(folder, *arguments, SWITOKD_COORDINATOR=server.address)
    assert (code, err) == (0, ""), err
    return out


def refused(folder: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """Exit code and the one line of a command that fails."""
    code, _, err = switokd(folder, *arguments, **env)
    (line,) = err.splitlines()
    assert line.startswith("switokd: ")
    return code, line


def test_a_run_from_its_start_to_the_journal(server: Server, tmp_path: Path) -> None:
    run_id = named(server, "alpha-1")
    streams = train(server, run_id, EXPERT, LEARNING, EXPERT)
    for stream in streams:
        stream.send(heartbeat=pb.Heartbeat(phase=pb.PHASE_BACKWARD, step=3, phase_seconds=0.5))

    def with_ranks() -> Any:
        view = json.loads(asked(server, tmp_path, "status", "alpha", "--json"))
        return view if len(view["ranks"]) == 2 else None

    view = wait_until(with_ranks, 20, "two heartbeats")
    assert (view["run_id"], view["state"], view["last_step"]) == (run_id, "training", 3)
    (pair,) = view["pairs"]
    assert (pair["mode"], pair["expert_ratio"], pair["switches"]) == ("expert", 2 / 3, 2)
    assert pair["margin"] == pair["gap"] - pair["threshold"]
    assert [n["is_paused"] for n in view["networks"]] == [True, None]
    assert [(r["phase"], r["step"], r["lag_steps"]) for r in view["ranks"]] == [
        ("backward", 3, 0),
        ("backward", 3, 0),
    ]
    table = asked(server, tmp_path, "status", "alpha")
    assert "alpha-1 training  step 3, switokd, 2 ranks connected" in table
    assert re.search(r"t +s +2\.0000 +\S+ +\+\S+ +expert +67 % +2", table)
    assert re.search(r"t +teacher +paused +67 %", table)
    assert re.search(r"1 +s +backward +\S+ s +3 +0 +\S+ s ago", table)

    listed = json.loads(asked(server, tmp_path, "runs", "--json"))
    (entry,) = (entry for entry in listed["runs"] if entry["run_id"] == run_id)
    assert (entry["state"], entry["ranks"], entry["connected_ranks"]) == ("training", 2, 2)
    assert re.search(r"alpha-1 +training +3 +2/2 +1T1S", asked(server, tmp_path, "runs"))

    finish(*streams)
    wait_until(lambda: run_id not in server.get("/metrics"), 20, "only the journal has it")
    assert run_id not in asked(server, tmp_path, "runs")
    assert re.search(r"alpha-1 +finished +3 +0/2", asked(server, tmp_path, "runs", "--finished"))
    view = json.loads(asked(server, tmp_path, "status", "alpha", "--json"))
    assert (view["state"], view["pairs"]) == ("finished", [pair])


def watch(server: Server, folder: Path, run_id: str, *options: str) -> Any:
    """A command that watches a run, once it has printed something; use it with `with`."""
    command = [*SWITOKD, "watch", run_id, "--interval", "0.1", *options]
    return process([*command, "--coordinator", server.address], folder, folder / "watch.log")


def test_watching_prints_a_line_per_update_and_ends_with_the_run(
    server: Server, tmp_path: Path
) -> None:
    run_id = named(server, "beta-1")
    log = tmp_path / "watch.log"
    with watch(server, tmp_path, run_id, "--json") as child:
        wait_until(lambda: log.read_text().count("\n"), 20, "a line")
        streams = train(server, run_id, EXPERT, LEARNING)
        wait_until(lambda: '"last_step": 2' in log.read_text(), 20, "the second step")
        assert child.poll() is None
        finish(*streams)
        assert child.wait(20) == 0
    views = [json.loads(line) for line in log.read_text().splitlines()]
    assert [view["state"] for view in views if view["state"] == "finished"] == ["finished"]
    assert views[-1]["last_step"] == 2
    code, out, _ = switokd(tmp_path, "watch", "beta", "--coordinator", server.address)
    assert code == 0
    assert re.fullmatch(
        r"\S+ beta-1 finished step 2; t-s gap 0\.1000 threshold \S+ learning, expert 50 %\n", out
    )


def test_watching_a_run_that_fails_ends_with_5(server: Server, tmp_path: Path) -> None:
    run_id = named(server, "gamma-1")
    teacher, student = train(server, run_id, LEARNING)
    log = tmp_path / "watch.log"
    with watch(server, tmp_path, run_id) as child:
        wait_until(lambda: "gamma-1 training step 1" in log.read_text(), 20, "a line")
        teacher.send(leave=pb.Leave(failure="out of memory"))
        assert child.wait(20) == 5
    assert student.end()[0] == "ABORTED"
    last = log.read_text().splitlines()[-1]
    assert last == "switokd: run gamma-1 has failed: rank 0 (t) stopped: out of memory"


def test_watching_a_run_that_is_stopped_ends_with_6(server: Server, tmp_path: Path) -> None:
    run_id = named(server, "epsilon-1")
    streams = train(server, run_id, LEARNING)
    log = tmp_path / "watch.log"
    with watch(server, tmp_path, run_id) as child:
        wait_until(lambda: "epsilon-1 training step 1" in log.read_text(), 20, "a line")
        for stream in streams:
            stream.send(leave=pb.Leave(stopped=True))
        assert child.wait(20) == 6
    assert "epsilon-1 stopped step 1" in log.read_text().splitlines()[-1]
    assert "stopped" in asked(server, tmp_path, "runs", "--finished")


def test_watching_on_a_terminal_is_a_live_table(server: Server, tmp_path: Path) -> None:
    run_id = named(server, "delta-1")
    streams = train(server, run_id, EXPERT, LEARNING)
    screen, terminal = pty.openpty()
    command = [*SWITOKD, "watch", run_id, "--coordinator", server.address, "--interval", "0.1"]
    env = environment(COLUMNS="120", LINES="40", TERM="xterm")
    with subprocess.Popen(
        command, stdout=terminal, stderr=terminal, cwd=tmp_path, env=env
    ) as child:
        os.close(terminal)
        shown = ""
        while "training" not in shown:
            shown += os.read(screen, 100_000).decode()
        finish(*streams)
        try:
            while more := os.read(screen, 100_000):
                shown += more.decode()
        except OSError:  # the terminal's other end is closed
            pass
        assert child.wait(20) == 0
    os.close(screen)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "threshold" in text
    assert "delta-1 training" in text
    assert "delta-1 finished" in text


def test_a_coordinator_that_is_replaced_is_found_again(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "watch.log"
    command = [*SWITOKD, "coordinator", "--port", str(port), "--http-port", "0"]
    command += ["--journal", "journal.db"]
    with process(command, tmp_path) as first:
        assert first.stdout is not None
        ready = json.loads(first.stdout.readline())
        server = Server(ready["grpc"], ready["http"], ready["pid"])
        run_id = named(server, "epsilon-1")
        train(server, run_id, LEARNING)
        with watch(server, tmp_path, run_id, "--json") as child:
            wait_until(lambda: '"recorded_step": 1' in log.read_text(), 20, "a step on the disk")
            first.terminate()
            first.wait(20)
            server.channel.close()
            before = log.read_text().count("\n")
            with process(command, tmp_path):
                wait_until(lambda: log.read_text().count("\n") > before + 1, 20, "more lines")
            assert child.poll() is None


def test_one_of_several_coordinators_has_the_run(server: Server, tmp_path: Path) -> None:
    named(server, "zeta-1")
    with coordinator(tmp_path) as other:
        named(other, "eta-1")
        both = f"{server.address},{other.address}"
        listed = json.loads(switokd(tmp_path, "runs", "--json", "--coordinator", both)[1])
        homes = {entry["run_id"]: entry["coordinator"] for entry in listed["runs"]}
        assert (homes["zeta-1"], homes["eta-1"]) == (server.address, other.address)
        for run_id, home in (("zeta-1", server.address), ("eta", other.address)):
            code, out, _ = switokd(tmp_path, "status", run_id, "--json", "--coordinator", both)
            assert (code, json.loads(out)["coordinator"]) == (0, home)
    code, out, err = switokd(tmp_path, "runs", "--coordinator", both)
    assert code == 4
    assert "zeta-1" in out
    assert f"no coordinator at {other.address}" in err


def test_mistakes_are_one_line_with_an_exit_code(server: Server, tmp_path: Path) -> None:
    for name in ("theta-one", "theta-two"):
        named(server, name)
    here = {"SWITOKD_COORDINATOR": server.address}
    nobody = f"127.0.0.1:{free_port()}"
    for command in (["runs"], ["status", "theta"], ["watch", "theta"]):
        code, line = refused(tmp_path, *command, "--coordinator", nobody)
        assert code == 4
        assert f"no coordinator at {nobody}: Connection refused" in line
        assert ("theta is no run folder, and no coordinator" in line) is (command != ["runs"])
    code, line = refused(tmp_path, "status", "theta", **here)
    assert code == 2
    assert "theta: 2 runs begin so: theta-one, theta-two" in line
    code, line = refused(tmp_path, "watch", "thetaone", **here)
    assert code == 2
    assert "no run thetaone" in line
    assert "the nearest: theta-one" in line
    code, line = refused(tmp_path, "runs", SWITOKD_COORDINATOR="here")
    assert code == 2
    assert "SWITOKD_COORDINATOR here: allowed are HOST:PORT" in line
    code, line = refused(tmp_path, "runs", "--coordinator", server.http)
    assert code in (2, 4)


@pytest.mark.timeout(180)
def test_a_real_run_is_watched_and_asked_by_its_folder(tmp_path: Path) -> None:
    """The coordinator is the run's own, which ends with it."""
    log, out, steps = tmp_path / "watch.log", tmp_path / "train.log", 60
    words = ("digits-2t1s", f"schedule.max_steps={steps}", "run_dir=out")
    with preloaded.forked(preloaded.train_ranks, 3, words, cwd=tmp_path, out=out) as training:
        wait_until(lambda: (tmp_path / "out" / "config.yaml").exists(), 60, "a run folder")
        with process([*SWITOKD, "watch", "out", "--json", "--interval", "0.1"], tmp_path, log) as w:
            assert training.wait(100) == 0, out.read_text()
            assert w.wait(30) == 0, log.read_text()
    views = [json.loads(line) for line in log.read_text().splitlines()]
    last = views[-1]
    assert (last["state"], last["last_step"]) == ("finished", steps)
    address = json.loads((tmp_path / "out" / "run.json").read_text())["coordinator"]
    live = [view for view in views if view["coordinator"] == address]
    assert live, log.read_text()
    assert all(view.keys() == last.keys() for view in views)

    (tmp_path / "out" / "run.json").write_text(
        json.dumps({"run_id": "gone", "epoch": 1, "coordinator": f"127.0.0.1:{free_port()}"})
    )
    code, text, err = switokd(tmp_path, "status", "out", "--json")
    assert code == 0, err
    view = json.loads(text)
    assert (view["state"], view["last_step"], view["folder"]) == ("finished", steps, "out")
    assert [n["name"] for n in view["networks"]] == ["teacher1", "teacher2", "student"]
    assert view["pairs"] == last["pairs"]
    assert all(n["test_accuracy"] > 0.1 for n in view["networks"])
    assert switokd(tmp_path, "watch", "out")[0] == 0
    (tmp_path / "out" / "summary.json").unlink()
    code, line = refused(tmp_path, "watch", "out")
    assert code == 5
    assert "interrupted" in line
    listed = {"runs": [], "truncated": False, "unreachable": []}
    check_documented([view, live[-1], listed])


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def check_documented(views: Sequence[Any]) -> None:
    """Every key of the documents is on the page that promises them."""
    page = (REPOSITORY / "docs" / "reference" / "coordinator.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert set(keys_of(list(views))) <= named, set(keys_of(list(views))) - named
