"""The order of a record: every step once, with every pair, in the order of the run's topology.

So each row has one place, which tells its step and pair. A row that names another step or pair
while the rows after it are in their places is in its own place, under a wrong name. All others are
missing, doubled or out of order.

Not covered: the numbers of a row (`derive.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from switokd.runs.replay.record import Record, Row


@dataclass(frozen=True)
class Difference:
    """One value of the record that is not the derived one.

    teacher, student: empty where no pair is concerned. recorded, derived: None where there is no
    value. place: number of the line or row.
    """

    step: int
    teacher: str
    student: str
    field: str
    recorded: object
    derived: object
    place: int | None = None


class Step(NamedTuple):
    """Rows of one step by number of their pair. follows: whether the step before it came before."""

    rows: dict[int, Row]
    follows: bool


class Steps:
    """Puts the rows of a record into steps. tell: receives every row that is not in its place."""

    def __init__(self, record: Record, tell: Callable[[Difference], None]) -> None:
        self._record, self._tell = record, tell
        self._first = record.first_step
        self._pairs = [(p.teacher, p.student) for p in record.deciding.topology.pairs]
        self._number = {pair: number for number, pair in enumerate(self._pairs)}
        self._missing: list[range] = []
        """Places that were passed over, and whose rows have not come yet."""
        self._strays: set[int] = set()
        """Places whose rows have come too early."""
        self._scattered: dict[int, dict[int, Row]] = {}
        """By step: rows of steps that are not in one piece."""

    def read(self) -> Iterator[Step]:
        """Yield the steps as they become whole; at the end, what there is of the others."""
        pairs, count = self._pairs, len(self._pairs)
        source = self._record.read()
        ahead = deque(islice(source, count + 1))
        step, number, rows = self._first, 0, dict[int, Row]()
        while ahead:
            row = ahead.popleft()
            ahead.extend(islice(source, 1))
            if row[0] != step or row[1:3] != pairs[number]:
                place = (step - self._first) * count + number
                if self._is_renamed(row, ahead, place):
                    row = self._rename(row, step, number)
                elif (found := self._find(row, ahead, place)) is None:
                    yield from self._gathered(row.step)
                    continue
                else:
                    self._missing.append(range(place, found))
                    if found // count + self._first != step:
                        self._scatter(step, rows)
                        step, rows = found // count + self._first, {}
                    number = found % count
            rows[number] = row
            number += 1
            if number == count:
                if len(rows) == count:
                    yield Step(rows, True)
                else:
                    self._scatter(step, rows)
                step, number, rows = step + 1, 0, {}
        self._scatter(step, rows)
        self._finish((step - self._first) * count + number)
        for rest in sorted(self._scattered):
            yield Step(self._scattered[rest], False)

    def _index(self, row: Row) -> int | None:
        """The place that a row names; None if the run has no such place."""
        number = self._number.get((row.teacher, row.student))
        if number is None or row.step < self._first:
            return None
        return (row.step - self._first) * len(self._pairs) + number

    def _fits(self, ahead: Sequence[Row], place: int) -> bool:
        """Whether the next row, or the one a step later, is where `place` comes next."""
        nearby = ((ahead[i], i) for i in (0, len(self._pairs) - 1) if i < len(ahead))
        return any(self._index(row) == place + i for row, i in nearby)

    def _is_renamed(self, row: Row, ahead: Sequence[Row], place: int) -> bool:
        """Whether a row is in its place, and names another one."""
        if ahead:
            return self._fits(ahead, place + 1) and not self._fits(ahead, place)
        last = self._record.last_step
        return last is not None and place == (last - self._first + 1) * len(self._pairs) - 1

    def _rename(self, row: Row, step: int, number: int) -> Row:
        """Tell the names that are wrong; return the row with the right ones."""
        teacher, student = self._pairs[number]
        right = row._replace(step=step, teacher=teacher, student=student)
        for name in ("step", "teacher", "student"):
            said, must = getattr(row, name), getattr(right, name)
            if said != must:
                self._tell(Difference(step, teacher, student, name, said, must, row.place))
        return right

    def _find(self, row: Row, ahead: Sequence[Row], place: int) -> int | None:
        """Return the later place at which the record goes on with this row.

        None, after telling, if it goes on at `place`: the row is doubled, or out of order.
        """
        index = self._index(row)
        if index is None:
            self._tell_row(row, "row", "a row that the run cannot have", None)
            return None
        if index > place and not self._fits(ahead, place):
            return index
        if index < place and not self._take(index):
            self._tell_row(row, "row", "doubled", "once")
            return None
        if index > place:
            self._strays.add(index)
        before = self._first + (place - 1) // len(self._pairs)
        self._tell_row(row, "order", f"after step {before}", f"after step {row.step - 1}")
        number = index % len(self._pairs)
        self._scattered.setdefault(row.step, {})[number] = row
        return None

    def _tell_row(self, row: Row, name: str, recorded: object, derived: object) -> None:
        self._tell(
            Difference(row.step, row.teacher, row.student, name, recorded, derived, row.place)
        )

    def _take(self, place: int) -> bool:
        """Whether a place was missing; it no longer is."""
        for number, passed in enumerate(self._missing):
            if place in passed:
                parts = (range(passed.start, place), range(place + 1, passed.stop))
                self._missing[number : number + 1] = [part for part in parts if part]
                return True
        return False

    def _scatter(self, step: int, rows: dict[int, Row]) -> None:
        if rows:
            self._scattered.setdefault(step, {}).update(rows)

    def _gathered(self, step: int) -> Iterator[Step]:
        """Yield a step all of whose rows have come by now."""
        if len(self._scattered.get(step, ())) == len(self._pairs):
            yield Step(self._scattered.pop(step), False)

    def _finish(self, place: int) -> None:
        """Tell what is missing. place: that of the next row, if there were one."""
        count, last = len(self._pairs), self._record.last_step
        end = place if last is None else (last - self._first + 1) * count
        if place < end:
            self._missing.append(range(place, end))
        elif place > end:
            surplus = f"up to step {self._first + (place - 1) // count}"
            self._tell(Difference(end // count + self._first, "", "", "row", surplus, None))
        elif place % count:
            step = self._first + place // count
            self._record.notes.append(f"the last step ({step}) lacks pairs: it is being written")
        for passed in self._missing:
            for left in self._without_strays(passed):
                self._tell_missing(left)

    def _without_strays(self, passed: range) -> Iterator[range]:
        start = passed.start
        for stray in sorted(s for s in self._strays if s in passed):
            yield range(start, stray)
            start = stray + 1
        yield range(start, passed.stop)

    def _tell_missing(self, places: range) -> None:
        """Tell missing rows: whole steps as a range, other rows one by one."""
        count, place = len(self._pairs), places.start
        while place < places.stop:
            step, number = divmod(place, count)
            steps = (places.stop - place) // count if number == 0 else 0
            first = self._first + step
            if steps:
                said = f"steps {first} to {first + steps - 1}" if steps > 1 else f"step {first}"
                self._tell(Difference(first, "", "", "row", "missing", said))
            else:
                self._tell(Difference(first, *self._pairs[number], "row", "missing", "a row"))
            place += steps * count or 1
