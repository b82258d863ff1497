"""A rank's client: reports, early decisions, the decision log, and a wrong coordinator.

The coordinator here is a fake, because the real one cannot be made to decide wrongly. Tests of the
real one are in `tests/services/test_coordinator.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest

from switokd.config.run_file import load
from switokd.coordination.client import Client
from switokd.coordination.membership import Endpoint, Membership
from switokd.distillation.decision import (
    Decision,
    Mode,
    PairDecision,
    decide,
)
from switokd.distillation.distances import Parts, means
from switokd.distillation.gap import (
    Distances,
    PairSums,
    delta,
    epsilon,
)
from switokd.distillation.topology import Pair
from switokd.errors import CoordinatorError, UsageError
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from switokd.wire import decision_to_wire, modes_from_wire, sums_from_wire
from tests.support import wait_until

FIRST, SECOND = Pair("teacher1", "student"), Pair("teacher2", "student")
PARTS: Parts = {  # one rank and 10 samples each; both far from their thresholds
    FIRST: [PairSums(15.0, 12.0, 2.0, 10)],
    SECOND: [PairSums(1.0, 12.0, 11.0, 10)],
}
PUBLISHED = load("digits-2t1s", ["distillation.semantics=published"])
PAPER = load("digits-2t1s")


@dataclass
class FakeCoordinator(pb_grpc.CoordinatorServiceServicer):
    """Answers every report with `answer`."""

    answer: Decision
    reports: list[pb.Report] = field(default_factory=list)

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        return pb.JoinResponse()

    def GetRunStatus(
        self, request: pb.GetRunStatusRequest, context: Any
    ) -> pb.GetRunStatusResponse:
        return pb.GetRunStatusResponse()

    def Train(
        self, requests: Iterator[pb.TrainRequest], context: Any
    ) -> Iterator[pb.TrainResponse]:
        for request in requests:
            if request.WhichOneof("event") == "attach":
                yield pb.TrainResponse(attached=pb.Attached(next_step=1))
            if request.WhichOneof("event") == "report":
                self.reports.append(request.report)
                yield pb.TrainResponse(decision=decision_to_wire(self.answer))


@contextmanager
def second_teacher(
    config: Any, answer: Decision, on_decision: Callable[[Decision], None] = lambda decision: None
) -> Iterator[tuple[Client, FakeCoordinator]]:
    """A client of rank 1, which holds the second teacher, at a fake coordinator."""
    coordinator = FakeCoordinator(answer)  # type: ignore[abstract]  # a client calls no more
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_CoordinatorServiceServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    membership = Membership(Endpoint(f"127.0.0.1:{port}"), "run", 1)
    client = Client(membership, config, config.placement_on(3), on_decision)
    try:
        yield client, coordinator
    finally:
        client.close(failure="the test is over")
        server.stop(None)


def correct_decision(config: Any) -> Decision:
    return decide(1, means(PARTS), config.method.rule)


def switched(pair: PairDecision) -> PairDecision:
    """The same numbers, the other mode."""
    return replace(pair, mode=Mode.LEARNING if pair.mode is Mode.EXPERT else Mode.EXPERT)


@pytest.mark.parametrize("config", [PAPER, PUBLISHED], ids=["paper", "published"])
def test_a_teacher_reports_its_own_pairs_and_decides_them_early(config: Any) -> None:
    """With published semantics, the second teacher's epsilon uses the first teacher's distances."""
    with second_teacher(config, correct_decision(config)) as (client, coordinator):
        assert client.pairs == ([SECOND] if config is PAPER else [SECOND, FIRST])
        measured = {pair: PARTS[pair] for pair in client.pairs}
        client.report(1, measured)
        early = client.decide_early(1, measured)
        assert early is not None
        decided = client.decision(1)
        assert early.mode(SECOND) is decided.mode(SECOND)
        whole = decide(1, means(measured), config.method.rule)
        assert early.pairs == tuple(p for p in whole.pairs if p.pair == SECOND)
        (report,) = coordinator.reports
        assert sums_from_wire(report) == {SECOND: PARTS[SECOND][0]}
        assert client.waits[0] > 0
        assert not report.HasField("decision_wait_seconds")
        client.report(2, measured, exchange_seconds=0.25)
        wait_until(lambda: len(coordinator.reports) == 2, 10, "the second report")
        assert coordinator.reports[1].decision_wait_seconds == client.waits[0]
        assert coordinator.reports[1].exchange_seconds == 0.25


def test_a_decision_that_differs_from_the_early_one_ends_the_rank() -> None:
    answer = correct_decision(PAPER)
    answer = replace(answer, pairs=tuple(switched(pair) for pair in answer.pairs))
    with second_teacher(PAPER, answer) as (client, _):
        client.report(1, {SECOND: PARTS[SECOND]})
        assert client.decide_early(1, {SECOND: PARTS[SECOND]}) is not None
        with pytest.raises(CoordinatorError, match="decided step 1 for teacher2 and student diff"):
            client.decision(1)


def test_a_message_that_cannot_be_read_ends_the_rank_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = decision_to_wire

    def unknown_mode(decision: Decision) -> pb.Decision:
        message = original(decision)
        message.pairs[0].mode = pb.MODE_UNSPECIFIED
        return message

    with second_teacher(PAPER, correct_decision(PAPER)) as (client, _):
        monkeypatch.setattr(f"{__name__}.decision_to_wire", unknown_mode)
        client.report(1, {SECOND: PARTS[SECOND]})
        with pytest.raises(CoordinatorError, match=r"sent a message that cannot be read: .*"):
            client.decision(1)


def test_it_is_said_who_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switokd.coordination.connection.WAITS_SECONDS", 0.1)
    config, said = load("digits-2t1s", ["coordinator.timeout=0.5"]), list[str]()
    membership = Membership(Endpoint("127.0.0.1:1"), "run", 1, epoch=1)
    with pytest.raises(CoordinatorError, match=r"127\.0\.0\.1:1 does not answer within 0\.5 s"):
        Client(membership, config, config.placement_on(3), say=said.append)
    assert said == [
        "waiting for the coordinator at 127.0.0.1:1, for up to 0.5 s; is coordinator.address "
        "right (its gRPC port), and 'switokd coordinator' running there?"
    ]


def test_at_the_threshold_the_teachers_first_rank_decides() -> None:
    """There, rounding may decide either way: the coordinator adopts what the report says."""
    e_s, e_t = 1.2, 1.0
    gap = delta(Distances(0.0, e_s, e_t, 1), epsilon(Distances(0.0, e_s, e_t, 1)))
    at_threshold = {SECOND: [PairSums(10 * gap, 10 * e_s, 10 * e_t, 10)]}
    answer = decide(1, means(at_threshold), PAPER.method.rule)
    with second_teacher(PAPER, answer) as (client, coordinator):
        client.report(1, at_threshold)
        assert client.decide_early(1, at_threshold) == answer
        assert client.decision(1) == answer
        assert modes_from_wire(coordinator.reports[0])[0] == {SECOND: answer.mode(SECOND)}


def test_close_waits_for_the_decision_log_but_no_step_does() -> None:
    may_write = threading.Event()
    written: list[int] = []

    def slow(decision: Decision) -> None:
        assert may_write.wait(30)
        written.append(decision.step)

    measured = {SECOND: PARTS[SECOND]}
    with second_teacher(PAPER, correct_decision(PAPER), slow) as (client, coordinator):
        client.report(1, measured)
        client.decision(1)
        coordinator.answer = replace(correct_decision(PAPER), step=2)
        client.report(2, measured)
        assert client.decision(2).step == 2
        assert written == []
        threading.Timer(0.1, may_write.set).start()
        client.close()
        assert written == [1, 2]


def test_an_error_of_the_decision_log_is_raised_by_the_next_report_or_by_close() -> None:
    is_closing = threading.Event()
    measured = {SECOND: PARTS[SECOND]}

    def full(decision: Decision) -> None:
        raise UsageError(f"no space left for step {decision.step}")

    def late(decision: Decision) -> None:
        assert is_closing.wait(30)
        full(decision)

    with second_teacher(PAPER, correct_decision(PAPER), full) as (client, _):
        client.report(1, measured)
        wait_until(lambda: client.failure, 10, "the failed decision log")
        with pytest.raises(UsageError, match="left for step 1"):
            client.report(2, measured)
    with second_teacher(PAPER, correct_decision(PAPER), late) as (client, _):
        client.report(1, measured)
        client.decision(1)
        threading.Timer(0.1, is_closing.set).start()
        with pytest.raises(UsageError, match="left for step 1"):
            client.close()
