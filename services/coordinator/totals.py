"""The sum of a pair's parts, added while the ranks report them.

A float sum depends on the order of its additions, and ranks report in any order. Therefore the
parts are added in a fixed tree, that of `gap.total`: ((a + b) + (c + d)) + e. A part is added to
its neighbour as soon as both are there. So the last report of a step leaves only one addition per
level of the tree, where a sum in rank order could leave all of them.

Not covered: which rank reports which part (`plan.py`).
"""

from __future__ import annotations

from switokd.distillation.gap import PairSums

Sums = tuple[float, float, float, int]
"""The numbers of a `PairSums`."""


class RunningTotal:
    """Adds `count` parts, each given once, in any order."""

    __slots__ = ("_count", "_missing", "_waiting", "samples", "value")

    def __init__(self, count: int) -> None:
        self._count = self._missing = count
        self._waiting: dict[tuple[int, int], Sums] = {}
        """Sums without their neighbour, by (nodes of the level, place in it)."""
        self.samples = 0
        """Samples of the parts that are there."""
        self.value: PairSums | None = None
        """The sum of all parts; None while some are missing."""

    @property
    def lacks_one(self) -> bool:
        """Whether all parts but one are there."""
        return self._missing == 1

    def add(self, place: int, part: PairSums) -> None:
        """Add the part with this number, counted from 0."""
        self._missing -= 1
        self.samples += part.n
        gap, e_s, e_t, n = part
        nodes = self._count
        while nodes > 1:
            neighbour = place ^ 1
            if neighbour < nodes:  # the last node of an odd level has none
                other = self._waiting.pop((nodes, neighbour), None)
                if other is None:
                    self._waiting[nodes, place] = gap, e_s, e_t, n
                    return
                # a + b and b + a are the same bits. `PairSums.__add__` would take twice as long.
                gap, e_s = gap + other[0], e_s + other[1]
                e_t, n = e_t + other[2], n + other[3]
            place, nodes = place // 2, (nodes + 1) // 2
        self.value = PairSums(gap, e_s, e_t, n)
