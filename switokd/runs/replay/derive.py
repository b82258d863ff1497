"""Derives a step again, and compares every number and mode with the record, bit for bit.

The same functions compute it as when the run was decided: epsilon, threshold and mode follow from
the distances. A distance itself follows from nothing in the record. It is compared with what a
distance can be: an L1 distance of distributions is at most 2 and obeys the triangle inequality.

Not covered: the order of the steps (`sequence.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from switokd.distillation.decision import Decision, Mode, PairDecision, Rule, unsafe_pairs
from switokd.distillation.gap import Distances, epsilon
from switokd.distillation.topology import Pair
from switokd.runs.replay.record import PLAIN, Record, Row
from switokd.runs.replay.sequence import Difference

LARGEST = 2 * (1 + 1e-5)
"""Largest mean L1 distance; float32 may round it up."""
TRIANGLE = 1e-4
"""By how much rounding may break the triangle inequality."""
EXPERT = Mode.EXPERT.value
MODES = tuple(mode.value for mode in Mode)


@dataclass(frozen=True)
class Rounded:
    """A recorded mode that rounding allows: a teacher's first rank has settled it."""

    step: int
    teacher: str
    student: str
    recorded: str
    derived: str
    place: int


class Derived(NamedTuple):
    """A whole step as it was derived, pair by pair in the run's order."""

    distances: Sequence[Distances]
    scales: Sequence[float]
    """What an operator multiplied each threshold by."""
    deltas: Sequence[float]
    modes: tuple[bool, ...]
    """Whether each pair is in expert mode, as the run applied it."""
    held: Sequence[bool]


class Deriver:
    """Derives the steps of one record. tell: receives each difference."""

    def __init__(self, record: Record, tell: Callable[[Difference], None]) -> None:
        self._tell = tell
        self._rule = record.deciding.rule
        self._pairs = record.deciding.topology.pairs
        number = {pair: i for i, pair in enumerate(self._pairs)}
        self._epsilon_of = [number[self._rule.epsilon_from.get(p, p)] for p in self._pairs]
        self._numbers_of = {
            teacher: [i for i, p in enumerate(self._pairs) if p.teacher == teacher]
            for teacher in record.deciding.topology.teachers
        }
        self._in_force = record.in_force
        self._plain = ([1.0] * len(self._pairs), [False] * len(self._pairs))
        self._paused_until = record.paused_until
        self._counts: Counter[tuple[bool, ...]] = Counter()
        """Number of steps by the modes of the pairs."""
        self._is_complete = True
        self.rows = self.held = self.scaled = 0
        """Number of rows; of those that an operator's command has held, or scaled."""
        self.rounded: list[Rounded] = []

    def derive(self, rows: Mapping[int, Row], follows: bool = True) -> Derived | None:
        """Derive one step. Returns None if a row is missing or impossible, after comparing others.

        rows: by number of the pair. follows: whether the step comes right after the one before.
        """
        self.rows += len(rows)
        derived = self._agreed([*rows.values()]) if follows else None
        if derived is None:
            derived = self._compared(rows)
        if derived is None:
            self._is_complete = False
            return None
        self._counts[derived.modes] += 1
        self._is_complete &= follows
        first = rows[0]
        if first.paused is not None:
            self._compare_paused(rows, derived.modes)
        if self._is_complete and first.step in self._paused_until:
            self._compare_sums(first.step)
        return derived

    def _agreed(self, rows: Sequence[Row]) -> Derived | None:
        """Derive a step that agrees with its record and concerns no operator; None for all others.

        This spares most of the time. The other way finds the same, and tells what differs.
        """
        rule, distances, deltas, modes = self._rule, [], [], []
        if rows and self._in_force(rows[0].step):
            return None
        for row in rows:
            gap, e_s, e_t = row[3:6]
            if row[10:12] != PLAIN[:2] or row[14] or not _is_possible(gap, e_s, e_t, row[9]):
                return None
            distances.append(Distances(gap, e_s, e_t, row[9]))
        for i, row in enumerate(rows):
            eps = epsilon(distances[self._epsilon_of[i]])
            delta = rule.delta(distances[i], eps)
            mode = rule.switch(distances[i], delta).value
            # 0.0 and -0.0 are equal, and have other bits.
            if eps != row[6] or delta != row[7] or not delta or mode != row[8]:
                return None
            deltas.append(delta)
            modes.append(mode == EXPERT)
        return Derived(distances, self._plain[0], deltas, tuple(modes), self._plain[1])

    def _compared(self, rows: Mapping[int, Row]) -> Derived | None:
        """Derive a step, and tell what differs."""
        distances = {i: d for i, row in rows.items() if (d := self._distances(row)) is not None}
        deltas, modes = {}, {}
        for i in distances:
            if (source := self._epsilon_of[i]) in distances:
                eps = epsilon(distances[source])
                deltas[i], modes[i] = self._compare(i, rows[i], distances, eps)
        numbers = range(len(self._pairs))
        if len(modes) < len(numbers):
            return None
        return Derived(
            [distances[i] for i in numbers],
            [rows[i].delta_scale for i in numbers],
            [deltas[i] for i in numbers],
            tuple([modes[i] for i in numbers]),
            [rows[i].held for i in numbers],
        )

    def _distances(self, row: Row) -> Distances | None:
        """The distances of a row; None, after telling, if they are impossible."""
        gap, e_s, e_t = row.gap, row.e_s, row.e_t
        if row.checksums:
            self._tell_value(row, "checksum", *row.checksums)
        if _is_possible(gap, e_s, e_t, row.n):
            return Distances(gap, e_s, e_t, row.n)
        is_in_range = True
        for name in ("gap", "e_s", "e_t"):
            if not 0 <= getattr(row, name) <= LARGEST:
                self._tell_value(row, name, getattr(row, name), "0 to 2")
                is_in_range = False
        if row.n <= 0:
            self._tell_value(row, "n", row.n, "1 or more")
        elif is_in_range:
            self._tell_value(row, "gap", gap, f"{abs(e_s - e_t):.6g} to {e_s + e_t:.6g}")
            return Distances(gap, e_s, e_t, row.n)
        return None

    def _compare(
        self, number: int, row: Row, distances: Mapping[int, Distances], eps: float
    ) -> tuple[float, bool]:
        """Compare one pair; return its threshold, and whether it is in expert mode."""
        rule, d = self._rule, distances[number]
        delta = rule.delta(d, eps)
        if row.delta_scale != 1.0:
            self.scaled += 1
            delta *= row.delta_scale
        for name, recorded, derived in (
            ("epsilon", row.epsilon, eps),
            ("delta", row.delta, delta),
        ):
            # 0.0 and -0.0 are equal, and have other bits.
            if recorded != derived or (not derived and repr(recorded) != repr(float(derived))):
                self._tell_value(row, name, recorded, derived)
        self._compare_commands(self._pairs[number], row)
        if row.held:
            self.held += 1
            if row.mode not in MODES:
                self._tell_value(row, "mode", row.mode, " or ".join(MODES))
            return delta, row.mode == EXPERT
        mode = rule.switch(d, delta).value
        if row.mode != mode:
            if row.mode in MODES and self._may_round(number, row, distances, eps, delta):
                self.rounded.append(
                    Rounded(row.step, row.teacher, row.student, row.mode, mode, row.place)
                )
                mode = row.mode
            else:
                self._tell_value(row, "mode", row.mode, mode)
        return delta, mode == EXPERT

    def _compare_commands(self, pair: Pair, row: Row) -> None:
        """Compare what a row says of commands with the run's commands, where these are known."""
        in_force = self._in_force(row.step)
        if in_force is None:
            return
        held, scale = in_force.holds.get(pair), in_force.scales.get(pair, 1.0)
        if row.delta_scale != scale:
            self._tell_value(row, "delta_scale", row.delta_scale, scale)
        if row.held != (held is not None):
            self._tell_value(row, "held", row.held, held is not None)
        elif held is not None and row.mode in MODES and row.mode != held.value:
            self._tell_value(row, "mode", row.mode, held.value)

    def _may_round(
        self,
        number: int,
        row: Row,
        distances: Mapping[int, Distances],
        eps: float,
        delta: float,
    ) -> bool:
        """Whether the pair is so close to its threshold that rounding may change its mode."""
        pair, scale = self._pairs[number], row.delta_scale
        rule = self._rule if scale == 1.0 else _scaled(self._rule, scale)
        mode = self._rule.switch(distances[number], delta)
        decided = PairDecision(pair, distances[number], eps, delta, mode)
        by_pair = {self._pairs[i]: d for i, d in distances.items()}
        return bool(unsafe_pairs(Decision(row.step, (decided,), ()), by_pair, rule))

    def _compare_paused(self, rows: Mapping[int, Row], modes: Sequence[bool]) -> None:
        """Compare which teachers were paused in a step."""
        for numbers in self._numbers_of.values():
            paused = self._rule.pauses and all(modes[i] for i in numbers)
            for i in numbers:
                if rows[i].paused != paused:
                    self._tell_value(rows[i], "paused", rows[i].paused, paused)

    def _compare_sums(self, step: int) -> None:
        """Compare in how many steps each teacher has paused up to the end of an epoch."""
        for teacher, recorded in self._paused_until[step].items():
            numbers = self._numbers_of.get(teacher, ())
            derived = sum(
                count
                for modes, count in self._counts.items()
                if self._rule.pauses and all(modes[i] for i in numbers)
            )
            if recorded != derived:
                self._tell(Difference(step, teacher, "", "steps_paused", recorded, derived))

    def _tell_value(self, row: Row, name: str, recorded: object, derived: object) -> None:
        self._tell(
            Difference(row.step, row.teacher, row.student, name, recorded, derived, row.place)
        )


def _is_possible(gap: float, e_s: float, e_t: float, n: int) -> bool:
    """Whether these can be mean L1 distances between two predictions and a target."""
    return (
        0 <= e_s <= LARGEST
        and 0 <= e_t <= LARGEST
        and 0 <= gap <= LARGEST
        and abs(e_s - e_t) - TRIANGLE <= gap <= e_s + e_t + TRIANGLE
        and n > 0
    )


def _scaled(rule: Rule, scale: float) -> Rule:
    """The rule whose threshold is multiplied by `scale`."""
    return replace(rule, switch=lambda d, delta: rule.switch(d, delta * scale))
