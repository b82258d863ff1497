"""Attacks by strangers on a live coordinator, while an honest run goes on undisturbed.

Not covered: who may join a run (a secret, certificates, tokens); random messages (`test_fuzz.py`).
"""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest

from switokd.services.coordinator.limits import option
from switokd.v1 import coordinator_pb2 as pb
from tests.services.live import (
    Coordinator,
    HonestRun,
    Stream,
    coordinator,
    frame,
    is_closed,
    plan,
    sums,
)
from tests.support import wait_until

OPTIONS = {
    "attach_seconds": 0.5,
    "max_unattached_streams": 20,
    "max_watchers": 20,
    "max_connections": 60,
    "handshake_seconds": 0.5,
    "idle_connection_seconds": 0.5,
    "http_header_seconds": 0.5,
    "max_http_header_bytes": 1000,
    "max_http_connections": 8,
    "forget_after": 0.5,
    "max_waiting_responses": 50,
    "message_rate": 500,
    "message_burst": 500,
    "call_rate": 50,
    "max_streams_per_connection": 2048,  # the attackers share one
    "call_burst": 300,
    "log_rate": 5,
}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    words = [word for name, value in OPTIONS.items() for word in (option(name), str(value))]
    folder = tmp_path_factory.mktemp("attacked")
    with coordinator(folder, *words, journal=True) as under_test:
        yield under_test
        lines = under_test.log.read_text().splitlines()
        assert not [line for line in lines if "Traceback" in line]
        assert all(line[:4].isdigit() for line in lines), "a line that is no line of the log"


@pytest.fixture
def honest(attacked: Coordinator) -> Iterator[HonestRun]:
    """A run that goes on during the test, and must not notice anything."""
    run = HonestRun(attacked)
    yield run
    run.end()
    assert run.slowest < 2.0


def test_a_wide_plan_and_a_wide_report_block_no_other_run(
    attacked: Coordinator, honest: HonestRun
) -> None:
    wide = [pb.PairSums(teacher=f"t{i % 100}", student=f"s{i // 100}") for i in range(10_000)]
    for _ in range(5):
        code, details = attacked.refused("wide", plan(networks=200, teachers=100))
        assert (code, "--max-networks" in details) == ("INVALID_ARGUMENT", True)
        stranger = Stream(attacked.address).attach(attacked.new_run(plan(ranks=1), ranks=1))
        stranger.send(report=pb.Report(step=1, pairs=wide[:1000]))
        assert stranger.end()[0] == "INVALID_ARGUMENT"
        stranger.close()
        stranger = Stream(attacked.address).attach(attacked.new_run(plan(ranks=1), ranks=1))
        stranger.send(report=pb.Report(step=1, pairs=wide))
        assert stranger.end()[0] == "RESOURCE_EXHAUSTED"
        stranger.close()


def test_of_two_first_joins_at_once_one_makes_the_run(
    attacked: Coordinator, honest: HonestRun
) -> None:
    """Plans with so many ranks are converted in a thread, while others may join."""
    plans = [plan(ranks=200, config_digest=digest) for digest in "ab"] * 4
    answers: list[tuple[str, str]] = []
    threads = [
        threading.Thread(target=lambda each=each: answers.append(attacked.refused("both", each)))
        for each in plans
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(code for code, _ in answers)
    assert codes == ["FAILED_PRECONDITION"] * 4 + ["OK"] * 4
    status = attacked.stub.GetRunStatus(pb.GetRunStatusRequest(run_id="both"))
    assert len(status.plan.networks[0].ranks) == 200


def test_malformed_messages_write_few_lines(attacked: Coordinator, honest: HonestRun) -> None:
    before = attacked.log.stat().st_size
    own = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(attacked.address, options=own) as channel:
        call: Any = channel.unary_unary("/switokd.v1.CoordinatorService/Join")
        answers = [call.future(b"\xff" * 2000, timeout=10) for _ in range(250)]
        assert {answer.code().name for answer in answers} == {"INVALID_ARGUMENT"}
        train: Any = channel.stream_stream("/switokd.v1.CoordinatorService/Train")
        for _ in range(30):
            stream = train(iter([b"\xff" * 2000]), timeout=10)
            assert stream.code().name == "INVALID_ARGUMENT"
    assert attacked.log.stat().st_size - before < 2000


def test_a_long_parting_sentence_reaches_the_other_ranks(
    attacked: Coordinator, honest: HonestRun
) -> None:
    for sentence in ("x" * 20_000, "ß" * 14_000, "\n" * 20_000, "\U0001f600" * 5000):
        run_id = attacked.new_run()
        leaving, other = (Stream(attacked.address).attach(run_id, rank) for rank in (0, 1))
        leaving.send(leave=pb.Leave(failure=sentence))
        code, details = other.end()
        assert code == "ABORTED"
        assert details.startswith("rank 0 (t) stopped: ")
        assert details.endswith("(cut)")
        assert len(details.encode()) <= 2000
        leaving.close()
        other.close()


def test_idle_streams_are_ended(attacked: Coordinator, honest: HonestRun) -> None:
    opened_at = time.monotonic()
    idle = [Stream(attacked.address, attacked.channel) for _ in range(100)]
    began = time.monotonic()
    ends = [stream.end() for stream in idle[:80]]
    took = time.monotonic() - opened_at
    ends += [stream.end() for stream in idle[80:]]
    assert {code for code, _ in ends} == {"RESOURCE_EXHAUSTED"}
    pushed_out = [details for _, details in ends if "--max-unattached-streams" in details]
    late = [details for _, details in ends if "--attach-seconds" in details]
    # 20 may wait at once, for half a second each: of the first 80, and the last 20.
    assert len(late) <= 20 * (1 + took / OPTIONS["attach_seconds"])
    assert pushed_out
    assert len(pushed_out) + len(late) == 100
    assert time.monotonic() - began < 5


def test_silent_connections_are_closed_and_leave_files_for_others(
    attacked: Coordinator, honest: HonestRun
) -> None:
    before = attacked.files()
    silent = [attacked.connect() for _ in range(200)]
    assert attacked.files() < before + 60 + 20
    wait_until(lambda: all(map(is_closed, silent)), 5, "all silent connections closed")
    wait_until(lambda: attacked.files() <= before + 2, 5, "their files closed")
    begun = [attacked.connect() for _ in range(20)]
    for connection in begun:
        connection.sendall(PREFACE)
    wait_until(lambda: all(map(is_closed, begun)), 5, "all connections without a call closed")
    for connection in (*silent, *begun):
        connection.close()
    assert attacked.refused("after") == ("OK", "")


def test_slow_http_requests_are_closed_and_keep_no_scrape_out(
    attacked: Coordinator, honest: HonestRun
) -> None:
    slow = [attacked.connect(attacked.http) for _ in range(40)]
    for connection in slow[:20]:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nX-A: ")
    with urllib.request.urlopen(f"http://{attacked.http}/metrics", timeout=5) as response:
        assert honest.run_id in response.read().decode()
    began = time.monotonic()
    while time.monotonic() - began < 0.8:
        for connection in slow:
            with suppress(OSError):
                connection.sendall(b"x")
        time.sleep(0.05)
    wait_until(lambda: all(map(is_closed, slow)), 5, "all slow requests closed")
    for connection in slow:
        connection.close()


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 5000, b"431 Request Header Fields Too Large"),
        (b"GET /healthz HTTP/1.1\r\n", b"408 Request Timeout"),
        (b"POST /healthz HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"\x16\x03\x01\n\n", b"400 Bad Request"),
        (b"GET /healthz HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET /other HTTP/1.1\r\n\r\n", b"404 Not Found"),
    ],
)
def test_http_requests_get_a_short_answer(
    attacked: Coordinator, request_: bytes, answer: bytes
) -> None:
    with closing(attacked.connect(attacked.http)) as connection:
        connection.sendall(request_)
        received = connection.recv(4096)
    assert received.startswith(b"HTTP/1.1 " + answer)


def test_ended_runs_leave_the_metrics(attacked: Coordinator, honest: HonestRun) -> None:
    run_ids = [attacked.new_run(plan(ranks=1), ranks=1) for _ in range(20)]
    for run_id in run_ids:
        stream = Stream(attacked.address, attacked.channel).attach(run_id)
        stream.send(leave=pb.Leave())
        assert stream.end() == ("OK", "")

    def shown() -> set[str]:
        url = f"http://{attacked.http}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            text = response.read().decode()
        return {run_id for run_id in run_ids if f'"{run_id}"' in text}

    wait_until(lambda: not shown(), 5, "ended runs have left the metrics")
    status = attacked.stub.GetRunStatus(pb.GetRunStatusRequest(run_id=run_ids[0]))
    assert status.state == pb.RUN_STATE_FINISHED


def test_a_flood_of_calls_is_held_back(tmp_path: Path) -> None:
    """The rate is so low that a slow machine is above it as well."""
    with coordinator(tmp_path, "--call-rate", "1", "--call-burst", "50") as flooded:
        honest = HonestRun(flooded)
        own = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(flooded.address, options=own) as channel:
            call: Any = channel.unary_unary("/switokd.v1.CoordinatorService/GetRunStatus")
            request = pb.GetRunStatusRequest(run_id=honest.run_id).SerializeToString()
            began = time.monotonic()
            answers = [call.future(request, timeout=60) for _ in range(250)]
            refused = [answer for answer in answers if answer.code().name != "OK"]
            served, seconds = len(answers) - len(refused), time.monotonic() - began
            assert 50 <= served <= 50 + seconds + 3, "the burst, one a second, and who waits"
            # HTTP/2 itself refuses calls above the number that a connection may have open (7).
            said = {"RESOURCE_EXHAUSTED": "limit is 1 (--call-rate)", "UNAVAILABLE": "error code 7"}
            assert all(said[each.code().name] in each.details() for each in refused)
            assert any(each.code().name == "RESOURCE_EXHAUSTED" for each in refused)
        honest.end()


def test_streams_of_other_services_are_limited(attacked: Coordinator, honest: HonestRun) -> None:
    watch: Any = attacked.channel.unary_stream("/grpc.health.v1.Health/Watch")
    streams = [watch(b"", timeout=10) for _ in range(20)]
    for stream in streams:
        next(stream)
    late = watch(b"", timeout=10)
    assert late.code().name == "RESOURCE_EXHAUSTED"
    assert "limit is 20 (--max-unattached-streams)" in late.details()
    for stream in streams:
        stream.cancel()


def test_watchers_are_limited_and_leave_room_when_they_go(
    attacked: Coordinator, honest: HonestRun
) -> None:
    request = pb.WatchRunRequest(run_id=honest.run_id)
    watchers = [attacked.stub.WatchRun(request, timeout=20) for _ in range(20)]
    for watcher in watchers:
        next(watcher)
    late = attacked.stub.WatchRun(request, timeout=20)
    assert late.code().name == "RESOURCE_EXHAUSTED"
    assert (
        late.details() == "20 callers watch runs: this coordinator's limit is 20 (--max-watchers)"
    )
    for watcher in watchers:
        watcher.cancel()
    wait_until(lambda: _can_watch(attacked, request), 10, "there is room again")


def _can_watch(attacked: Coordinator, request: pb.WatchRunRequest) -> bool:
    call = attacked.stub.WatchRun(request, timeout=20)
    try:
        next(call)
    except grpc.RpcError:
        return False
    call.cancel()
    return True


def test_a_flood_on_a_stream_is_held_back(attacked: Coordinator, honest: HonestRun) -> None:
    run_id = attacked.new_run()
    flood = Stream(attacked.address).attach(run_id)
    began, message = time.monotonic(), pb.Heartbeat(step=1)
    for _ in range(1000):
        flood.send(heartbeat=message)
    flood.send(leave=pb.Leave(failure="enough"))
    assert flood.end() == ("OK", "")
    assert time.monotonic() - began > 0.8
    flood.close()


def test_a_rank_that_does_not_read_loses_its_stream(
    attacked: Coordinator, honest: HonestRun
) -> None:
    window = [
        ("grpc.http2.lookahead_bytes", 1024),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    run_id = attacked.new_run()
    teacher = Stream(attacked.address).attach(run_id)
    deaf = Stream("", grpc.insecure_channel(attacked.address, options=window)).attach(run_id, 1)
    # An older gRPC takes 64 kB before the coordinator has to keep anything.
    for step in range(1, 1500):
        deaf.send(report=pb.Report(step=step, received_step=step))
        teacher.send(report=pb.Report(step=step, pairs=[sums(0.1, 1.0, 0.9)], received_step=step))
        assert next(teacher.call).decision.step == step
    code, details = deaf.end()
    # Its connection has no call any more, and may be closed before it reads the status.
    assert code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
    assert code == "UNAVAILABLE" or "limit is 50 (--max-waiting-responses)" in details
    deaf = Stream(attacked.address).attach(run_id, 1, attempt=2, received_step=1499)
    deaf.send(leave=pb.Leave(failure="enough"))
    deaf.end()
    for stream in (teacher, deaf):
        stream.close()


POISON: dict[str, dict[str, object]] = {
    "not a number": {"gap": float("nan")},
    "infinite": {"delta": float("inf")},
    "no mode": {"mode": pb.MODE_UNSPECIFIED},
    "another pair": {"student": "x" * 20},
    "of rank 1": {},
}


@pytest.mark.parametrize("case", POISON)
def test_a_settled_step_cannot_spoil_the_journal(
    attacked: Coordinator, honest: HonestRun, case: str
) -> None:
    run_id, rank = attacked.new_run(), int(case == "of rank 1")
    stranger = Stream(attacked.address).attach(run_id, rank)
    values = {"teacher": "t", "student": "s", "gap": 1.0, "mode": pb.MODE_EXPERT, "n": 1}
    pair = pb.PairDecision(**{**values, **POISON[case]})  # type: ignore[arg-type]
    stranger.send(settled=pb.Settled(decision=pb.Decision(step=1, pairs=[pair])))
    code, details = stranger.end()
    assert code == "INVALID_ARGUMENT", details
    stranger.close()
    step = honest.steps

    def recorded() -> int:
        status = attacked.stub.GetRunStatus(pb.GetRunStatusRequest(run_id=honest.run_id))
        return int(status.recorded_step)

    wait_until(lambda: recorded() >= step, 10, "the journal goes on")


@pytest.mark.parametrize(
    "report",
    [
        pb.Report(step=1, pairs=[pb.PairSums(teacher="t", student="s", n=2**62)]),
        pb.Report(step=-(2**63), previous_decided_alone=True),
        pb.Report(step=2**62, previous_decided_alone=True),
    ],
    ids=["samples", "lowest step", "highest step"],
)
def test_numbers_out_of_range_are_refused(
    attacked: Coordinator, honest: HonestRun, report: pb.Report
) -> None:
    stranger = Stream(attacked.address).attach(attacked.new_run())
    stranger.send(report=report)
    assert stranger.end()[0] in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    stranger.close()
    for wrong in (plan(first_step=-(2**63)), plan(round_timeout_seconds=float("nan"))):
        assert attacked.refused("wrong", wrong)[0] == "INVALID_ARGUMENT"


def test_lines_of_one_kind_are_limited_in_the_log(tmp_path: Path) -> None:
    with coordinator(tmp_path, "--log-rate", "3") as under_test:
        joined = count(1)

        def log_tells() -> str:
            under_test.join(f"run-{next(joined)}")
            text = under_test.log.read_text()
            return text if "left out" in text else ""

        began = time.monotonic()
        for _ in range(200):
            under_test.join(f"run-{next(joined)}")
        text = wait_until(log_tells, 10, "the number of lines that were left out")
        seconds = time.monotonic() - began
    assert text.count("new, 1T1S") <= 3 * (seconds + 2)
    assert re.search(r"\([1-9]\d* more lines like this were left out\)", text)
