"""A run without a server: wrong plans, joining, states, and the ranks that it waits for."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest

from switokd.coordination.connection import FINAL
from switokd.distillation.topology import Pair, Topology
from switokd.services.coordinator.run import CoordinatedRun, RunState
from tests.services.examples import LEARNING, PLAN, S, T, refusal, started


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topology": Topology((("a", T), ("a", S), ("s", S)))}, "same name"),
        ({"topology": Topology((("a", T), ("b", T), ("s", T)))}, "at least one teacher"),
        ({"ranks": ((0,), (2,), (3,))}, "none left out; got [0, 2, 3]"),
        ({"ranks": ((-1, 0), (0,), (0,))}, "none left out; got [-1, 0]"),
        ({"ranks": ((0, 1, 1), (1,), (2,))}, "ascend, each once"),
        ({"ranks": ((1, 0), (1,), (2,))}, "ascend, each once"),
        ({"ranks": ((0, 1), (), (2,))}, "a network has no rank"),
        ({"strategy": "nonsense"}, "is not one of switokd, vanilla, dml"),
        ({"strategy": "os:system"}, "start it with --strategy os:system"),
        ({"strategy_kwargs": "{"}, "Expecting"),
        ({"strategy_kwargs": "[1]"}, "must be a JSON object"),
        ({"strategy_kwargs": '"xy"'}, "must be a JSON object"),
        ({"strategy_kwargs": '{"delta": 1}'}, "cannot be created with strategy_kwargs"),
        ({"semantics": "rumoured"}, "one of paper, published"),
        (
            {"semantics": "published", "strategy": "kd"},
            "only for the strategies switokd and threshold",
        ),
        ({"round_timeout": 0.0}, "above 0"),
        ({"first_step": 0}, "the first step must be 1 or later"),
        ({"first_step": -(2**63)}, "the first step must be 1 or later"),
        ({"first_step": 2**63 - 1}, "the first step must be 1 or later"),
        ({"round_timeout": float("nan")}, "above 0"),
    ],
)
def test_refuses_a_wrong_plan(change: dict[str, object], words: str) -> None:
    kind, reason = refusal(lambda: CoordinatedRun("r", replace(PLAN, **change), now=0.0))  # type: ignore[arg-type]
    assert kind == "INVALID_ARGUMENT"
    assert words in reason


def test_refuses_another_configuration_and_names_the_rank() -> None:
    run = CoordinatedRun("r", PLAN, now=0.0)
    run.join(0, PLAN)
    kind, reason = refusal(lambda: run.join(1, replace(PLAN, config_digest="other")))
    assert kind == "FAILED_PRECONDITION"
    assert "rank 1 (b)" in reason
    assert run.joined == {0}


def test_joining_twice_changes_nothing_and_a_second_stream_is_refused() -> None:
    run = CoordinatedRun("r", PLAN, now=0.0)
    run.join(0, PLAN)
    run.join(0, PLAN)
    # It may have joined a coordinator that was here before: another attempt begins with Join.
    assert refusal(lambda: run.attach(1))[0] == "NOT_FOUND"
    assert grpc.StatusCode.NOT_FOUND not in FINAL
    run.attach(0)
    assert refusal(lambda: run.attach(0))[0] == "ALREADY_EXISTS"


def test_states_from_joining_to_finished() -> None:
    run = CoordinatedRun("r", PLAN, now=0.0)
    assert run.state is RunState.JOINING
    run = started()
    assert run.state is RunState.TRAINING
    for rank in (0, 1, 2):
        assert run.ended_at is None
        run.leave(rank, "", now=9.0)
    assert (run.state, run.ended_at) == (RunState.FINISHED, 9.0)


def test_a_run_that_a_rank_leaves_early_is_stopped() -> None:
    run = started()
    for rank in (0, 1, 2):
        assert not run.state.has_left
        run.leave(rank, "", now=9.0, stopped=rank < 2)  # the last one is of an older version
    assert (run.state, run.state.has_left, run.failure) == (RunState.STOPPED, True, "")


def test_a_lost_rank_fails_the_run_and_the_first_reason_stays() -> None:
    run = started()
    run.report(1, 1, {Pair("b", "s"): LEARNING}, now=0.0)
    run.lose(1, now=1.0)
    assert run.hang(now=6.0) is None
    run.fail(run.hang(now=6.1) or "", now=6.1)
    run.leave(0, "something else", now=7.0)
    assert run.state is RunState.FAILED
    assert run.failure == "rank 1 (b) went away after reporting step 1"
    assert run.ended_at == 6.1
    assert refusal(lambda: run.report(2, 1, {}, now=8.0))[0] == "FAILED_PRECONDITION"


def test_a_lost_rank_is_named_at_once_if_another_one_misses_it() -> None:
    run = started()
    run.lose(1, now=1.0)
    assert run.hang(now=1.1) is None
    run.stall(0, "exchanging the logits of step 1", now=1.2)
    assert run.hang(now=1.2) == "rank 1 (b) went away after reporting step 0"


def test_a_lost_rank_is_there_as_long_as_the_others_go_on_or_it_comes_back() -> None:
    run = started(replace(PLAN, round_timeout=3.0))
    run.lose(1, now=0.0)
    for step in range(1, 20):  # every step needs all ranks
        run.report(0, step, {Pair("a", "s"): LEARNING}, now=float(step))
        run.report(2, step, {}, now=float(step))
        assert run.hang(now=step + 0.5) is None
    run.attach(1)
    assert "no report of step 1 from rank 1 (b)" in (run.hang(now=30.0) or "")


def test_names_the_ranks_that_keep_a_round_open() -> None:
    run = started()
    run.report(0, 1, {Pair("a", "s"): LEARNING}, now=10.0)
    assert run.hang(now=70.0) is None
    reason = run.hang(now=70.1)
    assert reason is not None
    assert "step 1" in reason
    assert "rank 1 (b), rank 2 (s)" in reason
    run.report(1, 1, {Pair("b", "s"): LEARNING}, now=71.0)
    assert "from rank 2 (s) within" in (run.hang(now=71.0) or "")
    run.report(2, 1, {}, now=72.0)
    assert run.hang(now=1e9) is None  # between rounds the run waits for no rank


def test_names_the_ranks_that_never_attach() -> None:
    run = CoordinatedRun("r", PLAN, now=0.0)
    run.join(0, PLAN)
    run.attach(0)
    assert run.hang(now=60.0) is None
    assert "no stream from rank 1 (b), rank 2 (s)" in (run.hang(now=60.1) or "")


def test_names_the_rank_that_the_others_wait_for_in_a_collective() -> None:
    run = started()
    run.stall(0, "exchanging the logits of step 7", now=60.0)
    run.stall(2, "exchanging the logits of step 7", now=60.3)
    assert run.hang(now=60.9) is None
    reason = run.hang(now=61.1) or ""
    assert reason.startswith("rank 1 (b) did not answer")
    assert "exchanging the logits of step 7" in reason


def test_names_no_rank_when_a_collective_fails_on_every_rank() -> None:
    run = started()
    for rank in (0, 1, 2):
        run.stall(rank, "waiting", now=0.0)
    assert run.hang(now=2.0) == "every rank failed waiting"
