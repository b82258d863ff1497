"""A real coordinator process over gRPC: the contract, bad messages, health, metrics."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.support import process, run, wait_until

COMMAND = [sys.executable, "-m", "switokd", "coordinator"]
names = count()


@dataclass
class Server:
    """A coordinator under test."""

    address: str
    http: str
    pid: int
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.address)
        self.stub = pb_grpc.CoordinatorServiceStub(self.channel)

    def metrics(self) -> dict[str, float]:
        """All series, by name with labels."""
        text = self.get("/metrics")
        rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in rows}

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.http}{path}", timeout=5) as response:
            text: str = response.read().decode()
            return text

    def run(self) -> str:
        """Create a run of teacher "t" (rank 0) and student "s" (rank 1), both joined."""
        run_id = f"run{next(names)}"
        for rank in (0, 1):
            self.stub.Join(pb.JoinRequest(run_id=run_id, rank=rank, plan=plan()))
        return run_id


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with process([*COMMAND, "--port", "0", "--http-port", "0"], tmp_path_factory.mktemp("c")) as p:
        assert p.stdout is not None
        ready = json.loads(p.stdout.readline())
        started = Server(ready["grpc"], ready["http"], ready["pid"])
        yield started
        started.channel.close()


class Stream:
    """One rank's stream."""

    def __init__(self, server: Server, run_id: str = "", rank: int = 0) -> None:
        self.outgoing: SimpleQueue[pb.TrainRequest | None] = SimpleQueue()
        self.call = server.stub.Train(iter(self.outgoing.get, None), timeout=20)
        if run_id:
            self.send(attach=pb.Attach(run_id=run_id, rank=rank))
            assert next(self.call).WhichOneof("event") == "attached"

    def send(self, **event: object) -> None:
        self.outgoing.put(pb.TrainRequest(**event))  # type: ignore[arg-type]

    def report(self, step: int, *pairs: pb.PairSums) -> None:
        self.send(report=pb.Report(step=step, pairs=pairs))

    def decision(self) -> pb.Decision:
        decision: pb.Decision = next(self.call).decision
        return decision

    def end(self) -> tuple[str, str]:
        """Wait for the stream's end; return its status code and details."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            self.outgoing.put(None)
            return error.code().name, error.details() or ""
        self.outgoing.put(None)
        return "OK", ""


def plan(digest: str = "d", timeout: float = 60.0) -> pb.RunPlan:
    networks = [
        pb.Network(name="t", role=pb.ROLE_TEACHER, ranks=[0]),
        pb.Network(name="s", role=pb.ROLE_STUDENT, ranks=[1]),
    ]
    return pb.RunPlan(
        networks=networks, strategy="switokd", config_digest=digest, round_timeout_seconds=timeout
    )


def sums(gap: float, e_s: float, e_t: float, n: int = 1, teacher: str = "t") -> pb.PairSums:
    return pb.PairSums(teacher=teacher, student="s", gap=gap, e_s=e_s, e_t=e_t, n=n)


def test_a_run_from_join_to_leave(server: Server) -> None:
    run_id = server.run()
    teacher, student = Stream(server, run_id, 0), Stream(server, run_id, 1)
    student.report(1)
    teacher.report(1, sums(2.0, 2.0, 0.2, n=2))
    for stream in (teacher, student):  # every rank gets every decision
        decision = stream.decision()
        assert (decision.step, list(decision.paused)) == (1, ["t"])
        (pair,) = decision.pairs
        assert (pair.gap, pair.e_s, pair.e_t, pair.n) == (1.0, 1.0, 0.1, 2)
        assert pair.mode == pb.MODE_EXPERT
    student.report(2)
    teacher.report(2, sums(0.1, 1.0, 0.9))
    assert teacher.decision().pairs[0].mode == pb.MODE_LEARNING

    status = server.stub.GetRunStatus(pb.GetRunStatusRequest(run_id=run_id))
    assert status.state == pb.RUN_STATE_TRAINING
    assert list(status.connected_ranks) == [0, 1]
    assert status.last_decision.step == 2
    expected = plan()
    # The coordinator fills in the defaults of fields that are not set.
    expected.strategy_kwargs, expected.semantics, expected.first_step = "{}", "paper", 1
    assert status.plan == expected

    for stream in (teacher, student):
        stream.send(leave=pb.Leave())
        assert stream.end() == ("OK", "")
    status = server.stub.GetRunStatus(pb.GetRunStatusRequest(run_id=run_id))
    assert status.state == pb.RUN_STATE_FINISHED


def test_a_rank_that_does_not_read_delays_no_other_and_gets_all_decisions(server: Server) -> None:
    run_id, steps = server.run(), 1500
    teacher, student = Stream(server, run_id, 0), Stream(server, run_id, 1)
    for step in range(1, steps + 1):  # more decisions than fit into HTTP/2's first window
        student.report(step)
        teacher.report(step, sums(0.1, 1.0, 0.9))
        assert teacher.decision().step == step
    assert [student.decision().step for _ in range(steps)] == list(range(1, steps + 1))


BAD_FIRST_MESSAGES = {
    "unknown run": (pb.TrainRequest(attach=pb.Attach(run_id="nobody", rank=0)), "NOT_FOUND"),
    "report first": (pb.TrainRequest(report=pb.Report(step=1)), "INVALID_ARGUMENT"),
    "no event": (pb.TrainRequest(), "INVALID_ARGUMENT"),
    "rank outside": (pb.TrainRequest(attach=pb.Attach(run_id="RUN", rank=2)), "INVALID_ARGUMENT"),
    "settled beyond all steps": (
        pb.TrainRequest(attach=pb.Attach(run_id="RUN", settled_step=2**63 - 1)),
        "INVALID_ARGUMENT",
    ),
    "rank taken": (pb.TrainRequest(attach=pb.Attach(run_id="RUN", rank=0)), "ALREADY_EXISTS"),
}


@pytest.mark.parametrize("case", BAD_FIRST_MESSAGES)
def test_a_wrong_first_message_is_refused_and_harms_no_run(server: Server, case: str) -> None:
    run_id = server.run()
    teacher, student = Stream(server, run_id, 0), Stream(server, run_id, 1)
    message, code = BAD_FIRST_MESSAGES[case]
    if message.attach.run_id == "RUN":
        attach = pb.Attach()
        attach.CopyFrom(message.attach)
        attach.run_id = run_id
        message = pb.TrainRequest(attach=attach)

    stream = Stream(server)
    stream.outgoing.put(message)
    actual_code, details = stream.end()

    assert actual_code == code
    assert len(details.split()) > 4
    student.report(1)
    teacher.report(1, sums(0.1, 1.0, 0.9))
    assert student.decision().step == 1


BAD_REPORTS = {
    "not finite": ([sums(float("nan"), 1, 1)], 1, "INVALID_ARGUMENT"),
    "infinite": ([sums(1, float("inf"), 1)], 1, "INVALID_ARGUMENT"),
    "backwards": ([sums(1, 1, 1)], 0, "FAILED_PRECONDITION"),
    "ahead": ([sums(1, 1, 1)], 7, "FAILED_PRECONDITION"),
    "no pairs": ([], 1, "INVALID_ARGUMENT"),
    "unknown pair": (
        [pb.PairSums(teacher="t", student="nobody", gap=1, e_s=1, e_t=1, n=1)],
        1,
        "INVALID_ARGUMENT",
    ),
}


@pytest.mark.parametrize("case", BAD_REPORTS)
def test_a_bad_report_ends_its_own_run_only(server: Server, case: str) -> None:
    pairs, step, code = BAD_REPORTS[case]
    bad, good = server.run(), server.run()
    streams = [Stream(server, run_id, rank) for run_id in (bad, good) for rank in (0, 1)]

    streams[0].report(step, *pairs)

    actual_code, details = streams[0].end()
    assert actual_code == code
    assert "rank 0 (t)" in details
    # The other rank of the run is told which rank failed and why.
    assert streams[1].end() == ("ABORTED", f"rank 0 (t) stopped: {details}")
    streams[2].report(1, sums(0.1, 1.0, 0.9))
    assert streams[3].decision().step == 1


def test_a_rank_that_disconnects_is_named_to_the_others(server: Server) -> None:
    run_id = server.run()
    teacher, student = Stream(server, run_id, 0), Stream(server, run_id, 1)
    student.report(1)
    student.call.cancel()
    teacher.send(stall=pb.Stall(doing="exchanging the logits of step 2"))
    code, details = teacher.end()
    assert code == "ABORTED"
    assert details.startswith("rank 1 (s) went away")
    status = server.stub.GetRunStatus(pb.GetRunStatusRequest(run_id=run_id))
    assert (status.state, status.failure) == (pb.RUN_STATE_FAILED, details)


def test_a_rank_that_hangs_is_named_after_the_timeout(server: Server) -> None:
    run_id = f"run{next(names)}"
    for rank in (0, 1):
        request = pb.JoinRequest(run_id=run_id, rank=rank, plan=plan(timeout=0.5))
        server.stub.Join(request)
    teacher, _student = Stream(server, run_id, 0), Stream(server, run_id, 1)
    teacher.report(1, sums(0.1, 1.0, 0.9))
    teacher.decision()
    code, details = teacher.end()
    assert code == "ABORTED"
    assert "no report of step 1 from rank 1 (s) within 0.5 s" in details


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.JoinRequest(run_id="", rank=0, plan=plan()), "INVALID_ARGUMENT"),
        (pb.JoinRequest(run_id="x1", rank=9, plan=plan()), "INVALID_ARGUMENT"),
        (pb.JoinRequest(run_id="x2", rank=0), "INVALID_ARGUMENT"),
        (
            pb.JoinRequest(
                run_id="x3", plan=pb.RunPlan(networks=[pb.Network(name="a", ranks=[0])])
            ),
            "INVALID_ARGUMENT",
        ),
    ],
)
def test_join_refuses_a_wrong_request(server: Server, request_: pb.JoinRequest, code: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.stub.Join(request_)
    assert caught.value.code().name == code
    with pytest.raises(grpc.RpcError) as caught:
        server.stub.GetRunStatus(pb.GetRunStatusRequest(run_id=request_.run_id))
    assert caught.value.code().name == "NOT_FOUND"


def test_join_refuses_another_configuration(server: Server) -> None:
    run_id = f"run{next(names)}"
    server.stub.Join(pb.JoinRequest(run_id=run_id, rank=0, plan=plan()))
    with pytest.raises(grpc.RpcError) as caught:
        server.stub.Join(pb.JoinRequest(run_id=run_id, rank=1, plan=plan(digest="other")))
    assert caught.value.code().name == "FAILED_PRECONDITION"
    assert "rank 1 (s)" in (caught.value.details() or "")


def test_health_of_the_server_and_of_the_service(server: Server) -> None:
    health = health_pb2_grpc.HealthStub(server.channel)
    for service in ("", "switokd.v1.CoordinatorService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))  # type: ignore[attr-defined]
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_metrics_of_a_run(server: Server) -> None:
    run_id = server.run()
    teacher, student = Stream(server, run_id, 0), Stream(server, run_id, 1)
    modes = [(2.0, 1.0, 0.1), (2.0, 1.0, 0.1), (0.1, 1.0, 0.9), (2.0, 1.0, 0.1)]
    for step, distances in enumerate(modes, 1):
        student.report(step)
        report = pb.Report(step=step, pairs=[sums(*distances)], decision_wait_seconds=3e-4)
        teacher.send(report=report)
        teacher.decision()
    student.send(progress=pb.Progress(step=4, samples=256, loss=0.5, accuracy=0.75))
    pair, student_label = f'run="{run_id}",student="s",teacher="t"', f'network="s",run="{run_id}"'
    metrics = wait_until(
        lambda: (m := server.metrics()).get(f"switokd_samples_total{{{student_label}}}") and m,
        10,
        "samples counted",
    )
    assert metrics[f"switokd_gap{{{pair}}}"] == 2.0
    assert metrics[f"switokd_learning_mode{{{pair}}}"] == 0.0
    assert metrics[f"switokd_switches_total{{{pair}}}"] == 2.0
    assert metrics[f'switokd_pair_steps_total{{mode="expert",{pair}}}'] == 3.0
    assert metrics[f'switokd_pair_steps_total{{mode="learning",{pair}}}'] == 1.0
    assert metrics[f'switokd_paused_ratio{{network="t",run="{run_id}"}}'] == 0.75
    assert metrics[f"switokd_loss{{{student_label}}}"] == 0.5
    assert metrics[f"switokd_train_accuracy_ratio{{{student_label}}}"] == 0.75
    buckets = {"0.0002": 0.0, "0.00035": 4.0}
    for le, count_ in buckets.items():
        labels = f'le="{le}",network="t",run="{run_id}"'
        assert metrics[f"switokd_decision_wait_seconds_bucket{{{labels}}}"] == count_
    assert metrics[f'switokd_connected_ranks{{run="{run_id}"}}'] == 2.0


def test_a_rank_with_several_networks_has_metrics_of_each(server: Server) -> None:
    run_id = f"run{next(names)}"
    networks = [
        pb.Network(name=name, role=role, ranks=[0])
        for name, role in (
            ("s", pb.ROLE_STUDENT),
            ("t", pb.ROLE_TEACHER),
            ("u", pb.ROLE_TEACHER),
        )
    ]
    plan_ = pb.RunPlan(networks=networks, strategy="switokd", round_timeout_seconds=60)
    server.stub.Join(pb.JoinRequest(run_id=run_id, rank=0, plan=plan_))
    stream = Stream(server, run_id, 0)
    pairs = [sums(0.1, 1.0, 0.9), sums(0.1, 1.0, 0.9, teacher="u")]
    stream.send(
        report=pb.Report(step=1, pairs=pairs, decision_wait_seconds=3e-4, exchange_seconds=8e-4)
    )
    assert stream.decision().step == 1
    stream.send(progress=pb.Progress(step=1, samples=8, loss=0.25, network="t"))
    stream.send(progress=pb.Progress(step=1, samples=16, loss=0.5))
    rank = f'rank="0",run="{run_id}"'
    student, teacher = (f'network="{name}",run="{run_id}"' for name in ("s", "t"))
    metrics = wait_until(
        lambda: (m := server.metrics()).get(f"switokd_samples_total{{{student}}}") and m,
        10,
        "samples counted",
    )
    assert metrics[f"switokd_samples_total{{{teacher}}}"] == 8.0
    assert metrics[f"switokd_samples_total{{{student}}}"] == 16.0
    assert metrics[f"switokd_loss{{{teacher}}}"] == 0.25
    assert metrics[f"switokd_loss{{{student}}}"] == 0.5
    # The rank's wait counts for both teachers, its exchange once for the rank.
    assert metrics[f"switokd_decision_wait_seconds_count{{{teacher}}}"] == 1.0
    second = f'network="u",run="{run_id}"'
    assert metrics[f"switokd_decision_wait_seconds_count{{{second}}}"] == 1.0
    assert metrics[f"switokd_decision_wait_seconds_sum{{{second}}}"] == 3e-4
    assert f"switokd_decision_wait_seconds_count{{{student}}}" not in metrics
    assert metrics[f'switokd_exchange_seconds_bucket{{le="0.00075",{rank}}}'] == 0.0
    assert metrics[f'switokd_exchange_seconds_bucket{{le="0.001",{rank}}}'] == 1.0

    stream.send(progress=pb.Progress(step=1, samples=1, network="x"))
    code, details = stream.end()
    assert code == "INVALID_ARGUMENT"
    assert "rank 0 (s, t, u) sends the progress of 'x', which the run does not have" in details


def test_http_port_serves_healthz_and_no_page_by_chance(server: Server) -> None:
    assert server.get("/healthz") == "ok\n"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.get("/other")


def test_coordinator_process_has_no_torch(server: Server) -> None:
    maps = Path(f"/proc/{server.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert "torch" not in maps.read_text()


def test_a_port_in_use_is_one_line_and_exit_code_2(server: Server, tmp_path: Path) -> None:
    port = server.address.rpartition(":")[2]
    code, _, err = run([*COMMAND, "--port", port, "--http-port", "0"], tmp_path, 20)
    assert code == 2
    assert port in err
    assert "--port" in err
    assert "Traceback" not in err
