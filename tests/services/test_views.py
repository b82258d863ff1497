"""What a real coordinator says of its runs: lists, status, watching, and what its journal keeps.

Not covered: the commands that show it (`tests/cli/test_operate.py`).
"""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from switokd.v1 import coordinator_pb2 as pb
from tests.services.test_coordinator import COMMAND, Server, Stream, sums
from tests.support import process, require, wait_until

EXPERT, LEARNING = sums(2.0, 1.0, 0.1), sums(0.1, 1.0, 0.9)


@contextmanager
def coordinator(folder: Path, *options: str) -> Iterator[Server]:
    """A coordinator process with more options."""
    command = [*COMMAND, "--port", "0", "--http-port", "0", *options]
    with process(command, folder, folder / "coordinator.log") as child:
        ready = wait_until(lambda: _ready(folder / "coordinator.log"), 20, "a coordinator")
        server = Server(ready["grpc"], ready["http"], child.pid)
        yield server
        server.channel.close()


def _ready(log: Path) -> dict[str, str]:
    """What the coordinator has printed when it was ready."""
    lines = [line for line in log.read_text().splitlines(True) if line.startswith("{")]
    found: dict[str, str] = json.loads(lines[0]) if lines and lines[0].endswith("\n") else {}
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with coordinator(tmp_path_factory.mktemp("views")) as started:
        yield started


def train(server: Server, run_id: str, *steps: pb.PairSums) -> tuple[Stream, Stream]:
    """Let teacher and student of a run report steps; return their streams."""
    teacher, student = Stream(server, run_id, 0), Stream(server, run_id, 1)
    for step, distances in enumerate(steps, 1):
        student.report(step)
        teacher.report(step, distances)
        assert (teacher.decision().step, student.decision().step) == (step, step)
    return teacher, student


def finish(*streams: Stream) -> None:
    for stream in streams:
        stream.send(leave=pb.Leave())
        assert stream.end() == ("OK", "")


def status(server: Server, run_id: str) -> pb.GetRunStatusResponse:
    return server.stub.GetRunStatus(pb.GetRunStatusRequest(run_id=run_id), timeout=10)


def listed(server: Server, finished: bool = False, most: int = 0) -> list[pb.RunSummary]:
    request = pb.ListRunsRequest(finished=finished, page_size=most)
    return list(server.stub.ListRuns(request, timeout=10).runs)


def test_the_status_tells_pairs_networks_lag_and_times(server: Server) -> None:
    before = time.time()
    run_id = server.run()
    teacher, student = train(server, run_id, EXPERT, LEARNING, EXPERT, EXPERT)
    student.send(progress=pb.Progress(step=4, samples=64, loss=0.5, accuracy=0.25))
    for step in (5, 6):  # the student may be ahead of its teacher, never the other way round
        student.report(step)
    for stream in (teacher, student):
        stream.send(heartbeat=pb.Heartbeat(phase=pb.PHASE_BACKWARD, step=4, phase_seconds=0.5))
    found = wait_until(
        lambda: (s := status(server, run_id)) and len(s.ranks) == 2 and s, 10, "two heartbeats"
    )
    (pair,) = found.pairs
    assert (pair.teacher, pair.student, pair.expert_ratio, pair.switches) == ("t", "s", 0.75, 2)
    of_t, of_s = found.networks
    assert (of_t.name, of_t.paused_ratio, of_s.name, of_s.samples) == ("t", 0.75, "s", 64)
    assert (of_s.loss, of_s.accuracy) == (0.5, 0.25)
    assert not of_t.HasField("loss")
    assert [rank.lag_steps for rank in found.ranks] == [2, 0]
    assert before - 1 <= found.started_at <= time.time()
    assert found.ended_at == 0.0


def test_runs_are_listed_the_newest_first_and_not_more_than_asked_for(server: Server) -> None:
    first, second = server.run(), server.run()
    runs = listed(server)
    assert [run.run_id for run in runs[:2]] == [second, first]
    assert (runs[0].state, runs[0].ranks, runs[0].connected_ranks) == (pb.RUN_STATE_JOINING, 2, 0)
    assert [(n.name, list(n.ranks)) for n in runs[0].networks] == [("t", [0]), ("s", [1])]
    answer = server.stub.ListRuns(pb.ListRunsRequest(page_size=1), timeout=10)
    assert ([run.run_id for run in answer.runs], answer.truncated) == ([second], True)


def test_watching_ends_with_the_end_of_the_run(server: Server) -> None:
    run_id = server.run()
    call = server.stub.WatchRun(pb.WatchRunRequest(run_id=run_id, interval_seconds=0.1), timeout=20)
    assert next(call).status.state == pb.RUN_STATE_JOINING
    streams = train(server, run_id, LEARNING)
    wait_until(lambda: next(call).status.last_decision.step == 1, 10, "the first step")
    finish(*streams)
    *_, last = call
    assert last.status.state == pb.RUN_STATE_FINISHED
    assert last.status.ended_at >= last.status.started_at > 0
    again = list(server.stub.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=20))
    assert [message.status for message in again] == [last.status]


def test_watching_a_run_that_fails_ends_with_the_reason(server: Server) -> None:
    run_id = server.run()
    teacher, student = train(server, run_id, LEARNING)
    request = pb.WatchRunRequest(run_id=run_id, interval_seconds=3600.0)
    call = server.stub.WatchRun(request, timeout=20)
    assert next(call).status.state == pb.RUN_STATE_TRAINING
    teacher.send(leave=pb.Leave(failure="out of memory"))
    (last,) = call  # long before the interval is over
    assert last.status.state == pb.RUN_STATE_FAILED
    assert last.status.failure == "rank 0 (t) stopped: out of memory"
    assert student.end()[0] == "ABORTED"


def test_no_interval_floods_a_watcher(server: Server) -> None:
    request = pb.WatchRunRequest(run_id=server.run(), interval_seconds=1e-9)
    call = server.stub.WatchRun(request, timeout=20)
    next(call)
    started = time.monotonic()
    for _ in range(5):
        next(call)
    assert time.monotonic() - started > 0.45
    call.cancel()


@pytest.mark.parametrize("interval", [-1.0, float("nan"), float("inf")])
def test_an_interval_that_is_none_is_refused(server: Server, interval: float) -> None:
    request = pb.WatchRunRequest(run_id=server.run(), interval_seconds=interval)
    with pytest.raises(grpc.RpcError) as caught:
        list(server.stub.WatchRun(request, timeout=20))
    assert caught.value.code().name == "INVALID_ARGUMENT"
    assert "interval_seconds" in (caught.value.details() or "")


def test_an_unknown_run_cannot_be_watched(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(server.stub.WatchRun(pb.WatchRunRequest(run_id="nobody"), timeout=20))
    assert caught.value.code().name == "NOT_FOUND"


def reflected(server: Server) -> set[str]:
    """Services that reflection names."""
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    (answer,) = stub.ServerReflectionInfo(iter([ask]))  # type: ignore[operator]
    return {service.name for service in answer.list_services_response.service}


def test_reflection_is_off_unless_it_is_asked_for(server: Server, tmp_path: Path) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        reflected(server)
    assert caught.value.code().name == "UNIMPLEMENTED"
    with coordinator(tmp_path, "--reflection") as open_:
        assert {"switokd.v1.CoordinatorService", "grpc.health.v1.Health"} <= reflected(open_)


def test_a_watcher_of_a_coordinator_that_stops_is_told(tmp_path: Path) -> None:
    with coordinator(tmp_path) as server:
        call = server.stub.WatchRun(pb.WatchRunRequest(run_id=server.run()), timeout=20)
        next(call)
        subprocess.run(["kill", "-TERM", str(server.pid)], check=True)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code().name == "UNAVAILABLE"
    assert "stops" in (caught.value.details() or "")


def test_a_finished_run_leaves_the_metrics_and_stays_in_the_journal(tmp_path: Path) -> None:
    options = ("--journal", str(tmp_path / "journal.db"), "--forget-after", "0")
    with coordinator(tmp_path, *options) as server:
        run_id = server.run()
        finish(*train(server, run_id, EXPERT, LEARNING, LEARNING, LEARNING))
        wait_until(lambda: run_id not in server.get("/metrics"), 10, "no series of the run")
        assert run_id not in {run.run_id for run in listed(server)}
        (summary,) = listed(server, finished=True)
        assert (summary.run_id, summary.state) == (run_id, pb.RUN_STATE_FINISHED)
        assert (summary.ranks, summary.last_step) == (2, 4)
        assert summary.ended_at >= summary.started_at > 0
        found = status(server, run_id)
        assert (found.state, found.last_decision.step) == (pb.RUN_STATE_FINISHED, 4)
        assert (found.pairs[0].expert_ratio, found.pairs[0].switches) == (0.25, 1)
        assert [network.name for network in found.plan.networks] == ["t", "s"]
        (message,) = server.stub.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=20)
        assert message.status == found
    with coordinator(tmp_path, *options) as server:
        assert status(server, run_id) == found
        with pytest.raises(grpc.RpcError) as caught:
            status(server, "nobody")
        assert caught.value.code().name == "NOT_FOUND"


def test_a_failed_run_stays_in_the_journal_with_its_reason(tmp_path: Path) -> None:
    options = ("--journal", str(tmp_path / "journal.db"), "--forget-after", "0")
    with coordinator(tmp_path, *options) as server:
        run_id = server.run()
        teacher, student = train(server, run_id, LEARNING)
        teacher.send(leave=pb.Leave(failure="out of memory"))
        assert student.end()[0] == "ABORTED"
        wait_until(lambda: run_id not in {r.run_id for r in listed(server)}, 10, "it is forgotten")
        (summary,) = listed(server, finished=True)
        assert summary.state == pb.RUN_STATE_FAILED
        assert summary.failure == "rank 0 (t) stopped: out of memory"


def test_a_run_that_goes_on_with_the_next_coordinator_keeps_its_start(tmp_path: Path) -> None:
    options = ("--journal", str(tmp_path / "journal.db"))
    with coordinator(tmp_path, *options) as server:
        run_id = server.run()
        train(server, run_id, LEARNING, LEARNING)
        started = status(server, run_id).started_at
        wait_until(lambda: status(server, run_id).recorded_step == 2, 10, "two steps on the disk")
        subprocess.run(["kill", "-KILL", str(server.pid)], check=True)
    with coordinator(tmp_path, *options) as server:
        (summary,) = listed(server)
        assert (summary.run_id, summary.started_at, summary.last_step) == (run_id, started, 2)


def test_the_journal_is_copied_while_it_is_written_and_restored(tmp_path: Path) -> None:
    """The commands of docs/how-to/operate.md."""
    shell = require("sqlite3", "sqlite3")
    journal, copy = tmp_path / "journal.db", tmp_path / "backup.db"
    with coordinator(tmp_path, "--journal", str(journal)) as server:
        run_id = server.run()
        teacher, student = train(server, run_id, LEARNING)
        for step in range(2, 300):
            student.report(step)
            teacher.report(step, EXPERT if step % 3 else LEARNING)
            if step == 150:
                command = [shell, "-cmd", ".timeout 5000", str(journal), f".backup {copy}"]
                subprocess.run(command, check=True, timeout=60)
            teacher.decision()
        wait_until(lambda: status(server, run_id).recorded_step == 299, 20, "all steps")
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        steps = [row[0] for row in connection.execute("SELECT step FROM decisions ORDER BY 1")]
    assert steps == list(range(1, len(steps) + 1))
    assert 1 <= len(steps) <= 150
    copy.replace(journal)
    # The coordinator was killed, perhaps in the middle of a write; the page says to delete this.
    journal.with_name("journal.db-journal").unlink(missing_ok=True)
    with coordinator(tmp_path, "--journal", str(journal)) as server:
        (summary,) = listed(server)
        assert (summary.run_id, summary.last_step) == (run_id, len(steps))


def test_the_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    limit = ["bash", "-c", 'ulimit -Sn 256; exec "$@"', "bash", *COMMAND, "--port", "0"]
    with process([*limit, "--http-port", "0"], tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("{")
        limits = Path(f"/proc/{child.pid}/limits")
        if sys.platform != "linux" or not limits.exists():
            pytest.skip("needs /proc")
        (line,) = (row for row in limits.read_text().splitlines() if row.startswith("Max open"))
        soft, hard = line.split()[3:5]
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
    assert soft == hard
    assert hard != "256"
