"""Which rank the others wait for, from heartbeats, without a server.

Not covered: real ranks that stop (`tests/training/test_stuck.py`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from switokd.distillation.topology import Pair
from switokd.services.coordinator.health import Heartbeat
from switokd.services.coordinator.run import CoordinatedRun
from tests.services.examples import LEARNING, PLAN, started

WAITS = Heartbeat("exchange", 12, phase_seconds=0.0, still_seconds=0.0, waits=True)


def beat(run: CoordinatedRun, now: float, *heartbeats: Heartbeat) -> str | None:
    """Note one heartbeat per rank, and check the run."""
    for rank, heartbeat in enumerate(heartbeats):
        run.health.beat(rank, heartbeat, now)
    return run.hang(now)


def busy(phase: str, seconds: float, still: float | None = None, step: int = 12) -> Heartbeat:
    return Heartbeat(phase, step, seconds, seconds if still is None else still, waits=False)


def notices(run: CoordinatedRun) -> list[tuple[str, int | None]]:
    return [(notice.text, notice.reader) for notice in run.health.take_notices()]


def test_a_rank_that_the_others_wait_for_is_named_once_with_its_phase() -> None:
    run = started()
    assert beat(run, 9.0, WAITS, busy("backward", 9.0), WAITS) is None
    assert notices(run) == []
    for now in (11.0, 12.0):
        assert beat(run, now, WAITS, busy("backward", now), WAITS) is None
    sentence = "rank 1 (b) has been in backward of step 12 for 11 s; the other ranks wait for it"
    assert notices(run) == [(sentence, 0)]
    assert run.health.sentences() == [sentence.replace("11 s", "12 s")]
    assert [state.is_waited_for for state in run.health.ranks] == [False, True, False]


@pytest.mark.parametrize(
    "others",
    [
        (busy("forward", 20.0, still=1.0), WAITS),  # one that works is waited for as well
        (busy("evaluating", 20.0, still=0.1), busy("evaluating", 20.0, still=0.1)),
        (WAITS,),  # the third has sent nothing yet: an older version, or a new stream
    ],
)
def test_a_long_phase_is_no_hang_unless_all_others_wait(others: tuple[Heartbeat, ...]) -> None:
    run = started()
    assert beat(run, 100.0, busy("forward", 500.0), *others) is None
    assert notices(run) == []


def test_progress_in_an_evaluation_is_no_hang() -> None:
    run = started()
    for now in range(0, 500, 10):
        waits = replace(WAITS, phase_seconds=now, still_seconds=now)
        assert beat(run, now, waits, waits, busy("evaluating", now, still=4.0)) is None
    assert notices(run) == []


def test_a_rank_that_is_silent_is_named_whatever_the_others_do() -> None:
    run = started()
    works = busy("evaluating", 5.0, still=0.0)
    beat(run, 0.0, WAITS, works, works)
    run.health.beat(1, works, 11.0)
    run.health.beat(2, works, 11.0)
    assert run.hang(11.0) is None
    # Rank 0 said that it waits; it cannot show the sentence either.
    sentence = (
        "rank 0 (a) has sent no heartbeat for 11 s, and was last heard of in exchange of step 12"
    )
    assert notices(run) == [(sentence, 1)]


def test_a_rank_is_named_again_only_after_a_minute() -> None:
    run = started(replace(PLAN, round_timeout=1000.0))
    named = []
    for step in range(1, 11):  # every step takes 20 s
        for seconds in (5.0, 15.0):
            now = 20.0 * step + seconds
            beat(run, now, WAITS, busy("forward", seconds, step=step), WAITS)
            named += [now for _ in notices(run)]
    assert named == [35.0, 95.0, 155.0, 215.0]


@pytest.mark.parametrize("phase", ["evaluating", "saving"])
def test_a_hang_fails_the_run_after_the_timeout_also_outside_of_steps(phase: str) -> None:
    run = started()
    for now in (30.0, 62.0):
        waits = replace(WAITS, phase_seconds=now - 5, still_seconds=now)
        assert beat(run, now, waits, busy(phase, now), waits) is None
    waits = replace(WAITS, still_seconds=60.0)
    assert beat(run, 65.0, waits, busy(phase, 65.0), waits) is None  # they have just come
    waits = replace(WAITS, still_seconds=62.5)
    reason = beat(run, 67.5, waits, busy(phase, 90.0, still=67.5), waits)
    assert reason == (
        f"rank 1 (b) has been in {phase} after step 12 for 90 s, without progress for 68 s; the "
        "other ranks wait for it: it hangs (coordinator.timeout 60)"
    )


def test_silence_fails_the_run_after_the_timeout() -> None:
    run = started()
    works = busy("evaluating", 5.0, still=0.0)
    beat(run, 0.0, works, works, works)
    for now in (30.0, 62.0, 62.5):
        run.health.beat(0, works, now)
        run.health.beat(1, works, now)
        reason = run.hang(now)
    assert (reason or "").startswith(
        "rank 2 (s) has sent no heartbeat for 62 s, and was last heard of in eval"
    )


def test_other_reasons_tell_the_phase_too() -> None:
    run = started()
    beat(run, 60.0, WAITS, busy("forward", 60.0), WAITS)
    run.stall(0, "exchanging the logits of step 12", now=60.0)
    run.stall(2, "exchanging the logits of step 12", now=60.3)
    reason = run.hang(now=61.1) or ""
    assert "rank 1 (b) did not answer" in reason
    assert reason.endswith("; rank 1 (b) has been in forward of step 12 for 61 s")
    run = started()
    beat(run, 0.0, WAITS, busy("forward", 1.0), WAITS)
    run.lose(1, now=1.0)
    assert (run.hang(now=6.1) or "").endswith(
        "; it was last heard of in forward of step 12, 6 s ago"
    )


def test_a_silent_rank_is_placed_by_its_last_report_if_that_is_younger() -> None:
    run = started(replace(PLAN, first_step=12))
    beat(run, 0.0, WAITS, WAITS, WAITS)
    for rank in (0, 2):
        run.health.beat(rank, WAITS, now=11.0)
    run.report(1, 12, {Pair("b", "s"): LEARNING}, now=0.5)
    assert run.hang(11.0) is None
    ((text, _),) = notices(run)
    assert "no heartbeat for 11 s, and was last heard of in deciding of step 12; the" in text


def test_an_ended_run_waits_for_no_rank() -> None:
    run = started()
    beat(run, 0.0, WAITS, WAITS, WAITS)
    assert len(run.health.ranks) == 3
    run.fail("a reason", now=1.0)
    assert run.hang(100.0) is None
    assert run.health.ranks == ()
    assert notices(run) == []


def test_a_phase_before_the_first_step_and_a_new_stream() -> None:
    run = started()
    beat(run, 11.0, WAITS, busy("loading", 11.0, step=0), WAITS)
    assert "has been in loading before the first step for 11 s" in notices(run)[0][0]
    run.lose(1, now=11.0)
    run.attach(1)
    assert run.hang(12.0) is None
    assert [state.rank for state in run.health.ranks] == [0, 2]
