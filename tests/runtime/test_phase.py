"""What a rank notes about its own activity."""

from __future__ import annotations

import time

import pytest

from switokd.errors import CollectiveError
from switokd.runtime.phase import Activity, Doing, Phase
from switokd.runtime.process_group import collective_errors
from switokd.wire import PHASE_FROM_WIRE, PHASE_TO_WIRE


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in its only item."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_seconds_count_from_the_phases_begin_and_from_the_last_progress(clock: list[float]) -> None:
    activity = Activity()
    activity.begin(Phase.EVALUATING, 7)
    clock[0] += 5.0
    activity.progress()
    clock[0] += 2.0
    assert activity.now() == Doing(Phase.EVALUATING, 7, 7.0, 2.0, waits=False)
    activity.begin(Phase.SAVING)
    assert activity.now() == Doing(Phase.SAVING, 7, 0.0, 0.0, waits=False)


def test_the_begin_and_the_end_of_a_wait_are_progress(clock: list[float]) -> None:
    activity = Activity()
    clock[0] += 3.0
    with activity.waiting():
        clock[0] += 1.0
        with activity.waiting():
            clock[0] += 1.0
        assert activity.now().waits
        clock[0] += 4.0
        assert activity.now().still_seconds == 4.0
    assert activity.now() == Doing(Phase.LOADING, 0, 9.0, 0.0, waits=False)


def test_a_rank_waits_in_a_collective_also_if_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    activity = Activity()
    monkeypatch.setattr("switokd.runtime.process_group.ACTIVITY", activity)
    seen = []

    def fail() -> None:
        seen.append(activity.now().waits)
        raise RuntimeError("gone")

    with pytest.raises(CollectiveError, match="gone"), collective_errors("waiting"):
        fail()
    assert (seen, activity.now().waits) == ([True], False)


def test_the_wire_contract_knows_every_phase() -> None:
    names = {item.value for item in Phase}
    assert set(PHASE_TO_WIRE) == names
    assert set(PHASE_FROM_WIRE.values()) == names


def test_the_time_of_each_phase_adds_up_from_the_first_begin(clock: list[float]) -> None:
    activity = Activity()
    clock[0] += 50.0  # imports
    assert not any(activity.spent().values())
    for phase, seconds in ((Phase.LOADING, 1.0), (Phase.FORWARD, 2.0), (Phase.LOADING, 4.0)):
        activity.begin(phase, 1)
        clock[0] += seconds
    spent = {phase: seconds for phase, seconds in activity.spent().items() if seconds}
    assert spent == {Phase.LOADING: 5.0, Phase.FORWARD: 2.0}
