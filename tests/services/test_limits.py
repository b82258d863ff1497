"""Each limit of the coordinator: what is over it is refused in one sentence, or waits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from switokd.cli.main import app
from switokd.config.run_file import load
from switokd.coordination.client import Client
from switokd.coordination.membership import Endpoint, Membership
from switokd.errors import CoordinatorError, UsageError
from switokd.services.coordinator.bucket import TokenBucket
from switokd.services.coordinator.limits import DEFAULTS, Limits, option
from switokd.v1 import coordinator_pb2 as pb
from tests.services.live import Coordinator, HonestRun, Stream, coordinator, plan, sums
from tests.support import REPOSITORY, wait_until

OPTIONS = {
    "max_runs": 4,
    "max_ranks": 16,
    "max_networks": 12,
    "max_pairs": 20,
    "max_parts": 40,
    "max_round_timeout": 100,
    "max_name_length": 30,
    "max_kwargs_length": 50,
    "max_sentence_length": 40,
    "max_message_bytes": 4096,
    "max_report_bytes": 2048,
    "max_open_rounds": 8,
    "max_waiting_responses": 50,
    "message_rate": 100,
    "message_burst": 60,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """A coordinator with small limits."""
    words = [word for name, value in OPTIONS.items() for word in (option(name), str(value))]
    with coordinator(tmp_path_factory.mktemp("small"), *words) as under_test:
        yield under_test


PLANS = {
    "max_ranks": plan(ranks=17),
    "max_networks": plan(networks=13),
    "max_pairs": plan(networks=11, teachers=5),
    "max_parts": plan(networks=6, teachers=2, ranks=6),
    "max_round_timeout": plan(round_timeout_seconds=1e300),
    "max_name_length": plan(strategy="x" * 31),
    "max_kwargs_length": plan(strategy_kwargs="[" * 51),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_over_a_limit_is_refused_with_limit_value_and_option(
    small: Coordinator, name: str
) -> None:
    code, details = small.refused("wide", PLANS[name])
    assert code == "INVALID_ARGUMENT"
    assert f"limit is {OPTIONS[name]:g} ({option(name)})" in details
    assert re.search(r"\d", details.partition(":")[0]), "what was found is a number"
    assert len(details) < 200
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        small.stub.GetRunStatus(pb.GetRunStatusRequest(run_id="wide"))


@pytest.mark.parametrize("kwargs", ["[" * 50, "1" * 50, '{"delta": NaN}', "\ud7ff", '"' * 9])
def test_arguments_that_are_no_json_object_are_refused(small: Coordinator, kwargs: str) -> None:
    run_plan = plan(strategy="threshold", strategy_kwargs=kwargs)
    code, details = small.refused("kwargs", run_plan)
    assert (code, details[:24]) == ("INVALID_ARGUMENT", "the run's plan is wrong:")


@pytest.mark.parametrize("name", ["two\nlines", "a\x00b", "\x1b[31mred", "a\u202eb", "x" * 31])
def test_a_name_that_is_long_or_cannot_be_printed_is_refused(small: Coordinator, name: str) -> None:
    for code, details in (
        small.refused(name),
        small.refused(
            "r", pb.RunPlan(networks=[pb.Network(name=name, role=pb.ROLE_TEACHER, ranks=[0])])
        ),
    ):
        assert code == "INVALID_ARGUMENT"
        assert details.isprintable()
        assert "a name" in details
    with pytest.raises(grpc.RpcError) as caught:
        small.stub.GetRunStatus(pb.GetRunStatusRequest(run_id=name))
    assert caught.value.code().name == "INVALID_ARGUMENT"


def test_a_message_over_the_limit_is_refused(small: Coordinator) -> None:
    code, details = small.refused("x" * 5000)
    assert code == "INVALID_ARGUMENT"
    assert "limit is 4,096 (--max-message-bytes)" in details
    assert small.refused("x" * 50_000)[0] == "RESOURCE_EXHAUSTED"
    run_id = small.new_run()
    stream = Stream(small.address).attach(run_id)
    stream.send(leave=pb.Leave(failure="x" * 3000))
    code, details = stream.end()
    assert code == "RESOURCE_EXHAUSTED"
    assert "3003 bytes on a stream" not in details  # with the length of the fields it has more
    assert "limit is 2,048 (--max-report-bytes)" in details
    stream.close()


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x80", b"\x0a\x01\xff", b"\x00"])
def test_bytes_that_are_no_message_are_refused_in_one_sentence(
    small: Coordinator, data: bytes
) -> None:
    stream = Stream(small.address)
    stream.outgoing.put(data)
    code, details = stream.end()
    assert (code, details) == (
        "INVALID_ARGUMENT",
        f"{len(data)} bytes that are no TrainRequest message",
    )
    stream.close()
    service = "switokd.v1.CoordinatorService"
    methods = [f"/{service}/Join", f"/{service}/GetRunStatus", "/grpc.health.v1.Health/Check"]
    for method in methods:
        call: Any = small.channel.unary_unary(method)
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=5)
        assert caught.value.code().name == "INVALID_ARGUMENT"
        assert "bytes that are no" in (caught.value.details() or "")
    assert "Traceback" not in small.log.read_text()


def test_a_sentence_is_cut_and_cleaned(small: Coordinator) -> None:
    run_id = small.new_run()
    first, other = (Stream(small.address).attach(run_id, rank) for rank in (0, 1))
    first.send(leave=pb.Leave(failure="bad\n\x1b[31m" + "é" * 500))
    code, details = other.end()
    assert code == "ABORTED"
    assert details.startswith("rank 0 (t) stopped: bad  [31mé")
    assert details.endswith("(cut)")
    assert details.isprintable()
    assert len(details) < 80
    first.close()
    other.close()


def test_too_many_runs_push_out_ended_ones_and_then_are_refused(small: Coordinator) -> None:
    streams = [Stream(small.address).attach(small.new_run()) for _ in range(4)]
    code, details = small.refused("one-more")
    assert (code, details) == (
        "RESOURCE_EXHAUSTED",
        "the coordinator has 4 runs: this coordinator's limit is 4 (--max-runs)",
    )
    streams[0].send(leave=pb.Leave(failure="enough"))
    streams[0].end()
    assert small.refused("one-more") == ("OK", "")
    for stream in streams[1:]:
        stream.send(leave=pb.Leave(failure="enough"))
        stream.end()
        stream.close()


def test_a_rank_that_is_ahead_waits_and_is_not_refused(small: Coordinator) -> None:
    run_id = small.new_run()
    teacher, student = (Stream(small.address).attach(run_id, rank) for rank in (0, 1))
    for step in range(1, 30):
        student.send(report=pb.Report(step=step))
    for step in range(1, 30):
        teacher.send(report=pb.Report(step=step, pairs=[sums(0.1, 1.0, 0.9)], received_step=step))
    for stream in (teacher, student):
        assert [next(stream.call).decision.step for _ in range(29)] == list(range(1, 30))
        stream.send(leave=pb.Leave())
        assert stream.end()[0] == "OK"
        stream.close()


def test_decisions_that_a_rank_does_not_acknowledge_are_limited(small: Coordinator) -> None:
    run_id = small.new_run()
    ranks = [Stream(small.address).attach(run_id, rank, received_step=0) for rank in (0, 1)]
    teacher, student = ranks
    for step in range(1, 30):
        teacher.send(report=pb.Report(step=step, pairs=[sums(0.1, 1.0, 0.9)], received_step=step))
        student.send(report=pb.Report(step=step, received_step=0))
    code, details = teacher.end()
    assert code in ("RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED")
    assert "a rank has acknowledged no decision after step 0: this coordinator's limit" in details
    assert "limit is 8 (--max-open-rounds)" in details
    for stream in ranks:
        stream.close()


def test_a_fast_stream_is_slowed_and_not_refused() -> None:
    now = [0.0]
    bucket = TokenBucket(10.0, 5.0, clock=lambda: now[0])
    assert [bucket.take(10) for _ in range(5)] == [0.0] * 5
    assert bucket.take(10) == pytest.approx(0.1)
    assert bucket.take(4096) == pytest.approx(0.4)
    now[0] += 100.0
    assert [bucket.take(10) for _ in range(6)][:5] == [0.0] * 5


def test_a_flood_on_one_stream_is_held_back(small: Coordinator) -> None:
    run_id = small.new_run()
    stream = Stream(small.address).attach(run_id)
    for _ in range(100):
        stream.send(heartbeat=pb.Heartbeat(step=1))
    stream.send(leave=pb.Leave(failure="end"))
    honest = HonestRun(small, pause=0.02)  # slower than the limit, which holds back its streams
    assert stream.end()[0] == "OK"
    honest.end()
    stream.close()


def test_too_many_open_calls_are_refused(tmp_path: Path) -> None:
    with coordinator(tmp_path, "--max-streams", "4") as under_test:
        run_id = under_test.new_run()
        streams = [Stream(under_test.address).attach(run_id, rank) for rank in (0, 1)]
        streams += [Stream(under_test.address), Stream(under_test.address)]
        code, details = wait_until(
            lambda: (found := under_test.refused("more"))[0] != "OK" and found, 5, "a refusal"
        )
        assert code == "RESOURCE_EXHAUSTED"
        assert details == "4 calls are open: this coordinator's limit is 4 (--max-streams)"
        streams.pop().call.cancel()
        wait_until(lambda: under_test.refused("more") == ("OK", ""), 5, "room again")
        for stream in streams:
            stream.close()


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["--max-networks", "2"], UsageError, "refuses the run: the run has 3 networks"),
        (["--max-runs", "1"], CoordinatorError, "refuses this rank: the coordinator has 1 runs"),
    ],
)
def test_a_rank_tells_its_user_which_limit_refuses_it(
    tmp_path: Path, words: list[str], error: type[Exception], said: str
) -> None:
    with coordinator(tmp_path, *words) as under_test:
        present = Stream(under_test.address).attach(under_test.new_run())
        config = load("digits-2t1s")
        membership = Membership(Endpoint(under_test.address), "mine", 0)
        with pytest.raises(error) as caught:
            Client(membership, config, config.placement_on(3))
        assert said in str(caught.value)
        assert f"({words[0]})" in str(caught.value)
        present.close()


def test_every_limit_is_an_option_with_its_default_in_the_help() -> None:
    result = CliRunner().invoke(
        app, ["coordinator", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}
    )
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for each in fields(Limits):
        _, _, after = text.partition(f" {option(each.name)} ")
        assert f"[default: {each.default}]" in after[:400], each.name
    assert "─ Limits ─" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-runs", "0"], "allowed: a whole number, 1 to 1000000000"),
        (["--attach-seconds", "nan"], "allowed: a number, 0.1 to 3,600"),
        (["--attach-seconds", "soon"], "found soon"),
    ],
)
def test_a_limit_that_is_no_limit_is_refused(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["coordinator", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_the_reference_lists_every_limit_with_its_default() -> None:
    text = (REPOSITORY / "docs/reference/coordinator.md").read_text()
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([\d,.]+)[^|]* \|", text, re.MULTILINE))
    expected = {
        option(each.name): f"{each.default:,{'' if isinstance(each.default, int) else 'g'}}"
        for each in fields(Limits)
    }
    assert rows == expected


def test_a_coordinator_takes_as_many_connections_as_it_may_open_files(tmp_path: Path) -> None:
    """Without the check, the process would run out of files, and answer nobody."""
    with coordinator(tmp_path, "--max-connections", "1000000000") as under_test:
        wait_until(lambda: "open files (ulimit -Hn)" in under_test.log.read_text(), 5, "a line")
        assert under_test.refused("r") == ("OK", "")
    assert DEFAULTS.max_connections < 2**20
