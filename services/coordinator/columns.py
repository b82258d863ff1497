"""Rows of numbers over the steps of a run, in a bounded number of rows.

When there are too many rows, each two neighbours become one, which then stands for twice as many
steps. A run of any length thus keeps the same memory, and every row says for how many steps it
stands.

Not covered: what the columns mean (`history.py`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

STEP, TIME, COUNT = range(3)
"""Columns that every table has: first step of the row, time of its last one in seconds since 1970,
and number of steps."""
FIRST = 3
"""The first column of the table's own."""
ALWAYS = "qdI"
"""Types of the columns that every table has."""

Row = list[Any]
Numbers = Sequence[Any]
Merge = Callable[[Any, Any, int, int], Any]


def _mean(a: float, b: float, count_a: int, count_b: int) -> float:
    return (a * count_a + b * count_b) / (count_a + count_b)


MOST_OPEN, OPEN_NUMBERS = 32, 1000
"""Steps, and numbers of them, that are added up at once, within some tenths of a millisecond."""
MERGES: dict[str, Merge] = {
    "mean": _mean,
    "low": lambda a, b, *_: min(a, b),
    "high": lambda a, b, *_: max(a, b),
    "sum": lambda a, b, *_: a + b,
}
"""By kind of a column: how the numbers of two rows become one."""


class Columns:
    """A table whose rows are sorted by step.

    kinds: one of `MERGES` per column of its own; a "sum" counts steps, all others are measured.
    most: rows, at least 2. Readers call `flush` first.
    """

    def __init__(self, kinds: Sequence[str], most: int) -> None:
        self.kinds = tuple(kinds)
        self.most = max(most, 2)
        types = ALWAYS + "".join("I" if kind == "sum" else "f" for kind in kinds)
        self.arrays: list[array[Any]] = [array(kind) for kind in types]
        self.stride = 1
        """Steps for which a full row stands."""
        self.generation = 0
        """Rises when a row changes that is not the last one."""
        self._merges = [MERGES[kind] for kind in kinds]
        self._extremes = [
            (place, min if kind == "low" else max)
            for place, kind in enumerate(kinds)
            if kind in ("low", "high")
        ]
        self._open: list[Numbers] = []
        """Numbers of the last row's steps that the row does not have yet."""
        self._open_at = 0.0
        self._most_open = max(1, min(MOST_OPEN, OPEN_NUMBERS // max(len(kinds), 1)))

    def __len__(self) -> int:
        return len(self.arrays[STEP])

    @property
    def row_bytes(self) -> int:
        """Memory of one row."""
        return sum(column.itemsize for column in self.arrays)

    @property
    def last_step(self) -> int:
        """First step of the last row; -1: there is no row."""
        return self.arrays[STEP][-1] if len(self) else -1

    def add(self, step: int, at: float, numbers: Numbers) -> None:
        """Add the numbers of one step; mostly it is the last one. at: seconds since 1970."""
        steps = self.arrays[STEP]
        row, last = step // self.stride, steps[-1] // self.stride if steps else -1
        if row == last and step > steps[-1]:  # added up later, which is faster
            self._open.append(numbers)
            self._open_at = at
            if len(self._open) >= self._most_open:
                self.flush()
            return
        self.flush()
        if row > last:
            self._insert(len(steps), step, at, numbers)
        else:
            self._add_late(step, at, numbers)

    def _add_late(self, step: int, at: float, numbers: Numbers) -> None:
        """Add a step that comes before the last one."""
        steps, late = self.arrays[STEP], [step, at, 1, *numbers]
        place = bisect_right(steps, step) - 1
        if place >= 0 and steps[place] // self.stride == step // self.stride:
            self._put(place, self._merged(self._row(place), late))
        elif steps[place + 1] // self.stride == step // self.stride:
            self._put(place + 1, self._merged(late, self._row(place + 1)))
        else:
            self._insert(place + 1, step, at, numbers)
        self.generation += 1

    def flush(self) -> None:
        """Add to the last row what it does not have yet."""
        if not self._open:
            return
        last, added, n = self._row(len(self) - 1), self._open, len(self._open)
        self._open = []
        columns = list(zip(*added, strict=True))
        totals = [sum(column) for column in columns]
        row = [x if kind == "sum" else x / n for x, kind in zip(totals, self.kinds, strict=True)]
        for place, extreme in self._extremes:
            row[place] = extreme(columns[place])
        self._put(len(self) - 1, self._merged(last, [last[STEP], self._open_at, n, *row]))

    def cut(self, step: int) -> None:
        """Remove the rows from this step on."""
        self.flush()
        place = bisect_left(self.arrays[STEP], step)
        if place < len(self):
            self.generation += 1
            for column in self.arrays:
                del column[place:]

    def halve(self) -> None:
        """Let every two neighbours become one row."""
        self.flush()
        self.generation += 1
        self.stride *= 2
        left, right = self._neighbours()
        steps, times, counts = self.arrays[:FIRST]
        alone = [i == j for i, j in zip(left, right, strict=True)]
        made = [
            array("q", [steps[i] for i in left]),
            array("d", [max(times[i], times[j]) for i, j in zip(left, right, strict=True)]),
        ]
        weights = [
            (counts[i], 0 if is_alone else counts[j])
            for i, j, is_alone in zip(left, right, alone, strict=True)
        ]
        made.append(array("I", [n + m for n, m in weights]))
        for column, merge in zip(self.arrays[FIRST:], self._merges, strict=True):
            a, b = [column[i] for i in left], [column[j] for j in right]
            if column.typecode == "I":
                b = [0 if is_alone else y for y, is_alone in zip(b, alone, strict=True)]
            merged = [merge(x, y, *w) for x, y, w in zip(a, b, weights, strict=True)]
            made.append(array(column.typecode, merged))
        self.arrays = made

    def _neighbours(self) -> tuple[list[int], list[int]]:
        """Return the two rows of each row of the new stride; twice the same if it is alone."""
        left: list[int] = []
        right: list[int] = []
        last = -1
        for place, step in enumerate(self.arrays[STEP]):
            if step // self.stride == last:
                right[-1] = place
            else:
                left.append(place)
                right.append(place)
                last = step // self.stride
        return left, right

    def _insert(self, place: int, step: int, at: float, numbers: Numbers) -> None:
        for column, value in zip(self.arrays, (step, at, 1, *numbers), strict=True):
            column.insert(place, value)
        if len(self) > self.most:
            self.halve()

    def _row(self, place: int) -> Row:
        return [column[place] for column in self.arrays]

    def _put(self, place: int, row: Row) -> None:
        for column, value in zip(self.arrays, row, strict=True):
            column[place] = value

    def _merged(self, a: Row, b: Row) -> Row:
        """Return two neighbours as one row; a comes first."""
        counts = a[COUNT], b[COUNT]
        own = (
            merge(x, y, *counts)
            for merge, x, y in zip(self._merges, a[FIRST:], b[FIRST:], strict=True)
        )
        return [min(a[STEP], b[STEP]), max(a[TIME], b[TIME]), sum(counts), *own]
