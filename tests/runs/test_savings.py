"""Time that pauses saved, from made-up times."""

from __future__ import annotations

import pytest

from switokd.runs import savings


def test_wall_seconds_compares_with_steps_without_pauses() -> None:
    # Two epochs; a step takes 10 s, 4 s with "a" paused, 1 s with both; evaluation takes 100 s.
    first = {1: 0.0, 2: 10.0, 3: 14.0, 4: 24.0}
    second = {5: 124.0, 6: 125.0, 7: 129.0}
    paused = {2: ("a",), 5: ("a", "b"), 6: ("a",), 4: ("a",)}
    assert savings.wall_seconds([first, second], paused) == pytest.approx(6 + 9 + 6)


def test_wall_seconds_are_unknown_without_a_step_to_compare_with() -> None:
    assert savings.wall_seconds([{1: 0.0, 2: 1.0}], {1: ("a",)}) is None
    assert savings.wall_seconds([], {}) is None


def test_device_seconds_count_every_rank_of_a_paused_teacher() -> None:
    rank = {"network": "t", "steps_paused": 3, "steps_learned": 2, "learning_seconds": 8.0}
    later = {"network": "t", "steps_paused": 5, "steps_learned": 0, "learning_seconds": 0.0}
    student = {"network": "s", "steps_paused": 0, "steps_learned": 5, "learning_seconds": 9.0}
    assert savings.device_seconds([rank, rank, student]) == pytest.approx(24.0)
    # Paused steps cost the mean of the learning steps, also in an epoch with pauses only.
    assert savings.device_seconds([rank, later, student]) == pytest.approx(32.0)
    assert savings.device_seconds([later, student]) is None


def test_teachers_device_seconds_are_all_ranks_of_all_teachers() -> None:
    rows = [
        {"role": "teacher", "learning_seconds": 8.0},
        {"role": "teacher", "learning_seconds": 0.5},
        {"role": "student", "learning_seconds": 9.0},
    ]
    assert savings.teachers_device_seconds(rows) == 8.5
