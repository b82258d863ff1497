"""A total that is added while the parts come in any order has the bits of the one added at once."""

from __future__ import annotations

import random

import pytest

from switokd.distillation.gap import PairSums, total
from switokd.services.coordinator.totals import RunningTotal


def random_parts(count: int, generator: random.Random) -> list[PairSums]:
    """Parts whose sum depends on the order of the additions."""

    def number() -> float:
        return generator.random() * 10.0 ** generator.randrange(9)

    return [PairSums(number(), number(), number(), generator.randrange(1, 9)) for _ in range(count)]


@pytest.mark.parametrize("count", [*range(1, 18), 31, 32, 33, 1000, 1024])
def test_any_order_gives_the_bits_of_the_tree(count: int) -> None:
    generator = random.Random(count)
    parts = random_parts(count, generator)
    for _ in range(5):
        running = RunningTotal(count)
        order = list(range(count))
        generator.shuffle(order)
        for place in order:
            assert running.value is None
            assert running.lacks_one == (place == order[-1])
            running.add(place, parts[place])
        assert running.value == total(parts)
        assert running.samples == sum(part.n for part in parts)


def test_the_tree_adds_neighbours() -> None:
    a, b, c, d, e = (PairSums(v, v, v, 1) for v in (1e16, 1.0, 1.0, 1.0, -1e16))
    assert total([a, b, c, d, e]).gap == ((1e16 + 1.0) + (1.0 + 1.0)) + -1e16 == 2.0
    assert (((1e16 + 1.0) + 1.0) + 1.0) + -1e16 == 0.0, "the sum in order has other bits"


@pytest.mark.parametrize("last", [0, 511, 1023])
def test_the_last_part_leaves_one_addition_per_level(last: int) -> None:
    running, part = RunningTotal(1024), PairSums(1.0, 1.0, 1.0, 1)
    for place in range(1024):
        if place != last:
            running.add(place, part)
    waiting = len(running._waiting)
    running.add(last, part)
    assert waiting == 10  # one per level
    assert running.value == PairSums(1024.0, 1024.0, 1024.0, 1024)
