"""Candidate placements: how samples are distributed over ranks with unequal work.

Not covered: which candidate is best (`test_cost_model.py`, by exhaustive search).
"""

from __future__ import annotations

from itertools import product

import pytest

from switokd.planning.candidates import distribute_samples


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
def test_distribution_minimises_the_largest_work_of_a_rank(
    loads: tuple[float, ...], work: float
) -> None:
    batch = 20

    def largest_work(samples: tuple[int, ...]) -> float:
        return max(load + n * work / batch for load, n in zip(loads, samples, strict=True))

    samples = tuple(distribute_samples(loads, work, batch))
    assert sum(samples) == batch
    assert 1 not in samples
    ways = [way for way in product(range(batch + 1), repeat=3) if sum(way) == batch]
    assert largest_work(samples) == pytest.approx(min(map(largest_work, ways)))


def test_all_samples_are_distributed_whatever_they_cost() -> None:
    assert distribute_samples((0.0, 0.0), 0.0, 8) == [8, 0]
    assert distribute_samples((0.0, 1.0, 1.0), 1.0, 2) == [2, 0, 0]
    assert sorted(distribute_samples((0.0, 0.0, 0.0), 1.0, 4)) == [
        0,
        0,
        4,
    ]  # no rank gets a single sample
    assert distribute_samples((0.0, 0.0, 0.0), 3.0, 256) == [86, 85, 85]
