"""Placements worth predicting: how a network's samples fill up what others leave.

Not covered: which of them is best (`test_plan.py`, by exhaustive search).
"""

from __future__ import annotations

from itertools import product

import pytest

from switokd.planning.candidates import _whole_samples


@pytest.mark.parametrize(
    ("loads", "work"),
    [
        ((0.0, 0.0, 0.0), 20.0),
        ((0.0, 0.0, 3.3), 20.0),
        ((0.0, 2.4, 3.3), 17.0),
        ((9.0, 0.0, 0.0), 4.0),
        ((0.1, 0.2, 0.3), 5.0),
    ],
)
def test_no_other_way_has_less_to_do_for_the_rank_with_most(
    loads: tuple[float, ...], work: float
) -> None:
    batch = 20

    def most(samples: tuple[int, ...]) -> float:
        return max(load + n * work / batch for load, n in zip(loads, samples, strict=True))

    found = tuple(_whole_samples(loads, work, batch))
    assert sum(found) == batch
    assert 1 not in found
    ways = [way for way in product(range(batch + 1), repeat=3) if sum(way) == batch]
    assert most(found) == pytest.approx(min(map(most, ways)))


def test_samples_are_all_dealt_out_whatever_they_cost() -> None:
    assert _whole_samples((0.0, 0.0), 0.0, 8) == [8, 0]
    assert _whole_samples((0.0, 1.0, 1.0), 1.0, 2) == [2, 0, 0]
    assert sorted(_whole_samples((0.0, 0.0, 0.0), 1.0, 4)) == [0, 0, 4]  # a single one is none
    assert _whole_samples((0.0, 0.0, 0.0), 3.0, 256) == [86, 85, 85]
