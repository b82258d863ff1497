"""A set of steps, stored as ranges: a run has millions of steps and few gaps.

Not covered: taking steps out.
"""

from __future__ import annotations

from bisect import bisect_left

StepRange = tuple[int, int]
"""First and last step, both included."""


class StepSet:
    """Steps, as ascending ranges that do not touch each other."""

    def __init__(self) -> None:
        self._ranges: list[StepRange] = []

    def __contains__(self, step: int) -> bool:
        i = bisect_left(self._ranges, (step + 1,)) - 1
        return i >= 0 and self._ranges[i][1] >= step

    @property
    def range_count(self) -> int:
        """Number of ranges."""
        return len(self._ranges)

    @property
    def last_before_gap(self) -> int:
        """The last step of the first range. IndexError if the set is empty."""
        return self._ranges[0][1]

    def add(self, step: int) -> None:
        """Add one step."""
        if self._ranges and self._ranges[-1][1] == step - 1:  # nearly always
            self._ranges[-1] = (self._ranges[-1][0], step)
        elif step not in self:
            i = bisect_left(self._ranges, (step,))
            first = last = step
            if i < len(self._ranges) and self._ranges[i][0] == step + 1:
                last = self._ranges.pop(i)[1]
            if i > 0 and self._ranges[i - 1][1] == step - 1:
                i -= 1
                first = self._ranges.pop(i)[0]
            self._ranges.insert(i, (first, last))

    def gaps(self, first: int, last: int) -> list[StepRange]:
        """Return the ranges between two steps, both included, that are not in the set."""
        found, start = [], first
        for begin, end in self._ranges:
            if begin > last:
                break
            if begin > start:
                found.append((start, begin - 1))
            start = max(start, end + 1)
        return [*found, (start, last)] if start <= last else found
