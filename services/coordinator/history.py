"""What a run has done so far, for the status page: in few bytes, and cheap per step.

Decisions become rows of `Columns`. Progress of networks becomes *marks*. What happens now and then
becomes *events*. The event loop adds, and only puts decisions in a queue: other threads take them
in, and read. Large runs would take the event loop for too long.

Not covered: the file in which a history stays (`journal_history.py`).
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from switokd.distillation.decision import Decision, Mode
from switokd.services.coordinator.columns import FIRST, STEP, Columns
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.reasons import REASONS, reasons
from switokd.services.coordinator.text import sentence

MOST_ROWS, LEAST_ROWS = 1024, 16
RUN_BYTES = 2**18
"""Memory of a run's rows, about; a run with many pairs has fewer rows."""
MOST_MARKS = 2048
MOST_EVENTS = 300
EVENT_LETTERS = 300
"""Letters of an event's text; the rest is cut off."""
MOST_WAITING = 4096
"""Decisions in the queue; if no thread takes them in, the next one does."""
EVENT_BYTES = 300
"""Memory of an event beside its text, about."""
TOGETHER_SECONDS = 2.0
"""Events of several ranks within this time are one event."""

PAIR_KINDS = ("mean", "low", "high", "mean", "mean", "mean", "sum")
PAIR_NAMES = ("gap", "low", "high", "threshold", "e_s", "e_t", "learning")
"""Columns of a pair: means over a row's steps, the least and the greatest gap, and the number of
steps in learning mode."""
MARK_KINDS = ("loss", "accuracy", "test_accuracy")
INDEX_OF = {reason: place for place, reason in enumerate(REASONS)}


class HistoryMemory:
    """What the histories of all runs may take together. limit: bytes, about."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.runs = limit, 0, 0

    def is_short(self, own: int) -> bool:
        """Whether a history of so many bytes takes more than its share of too little memory."""
        return self.used > self.limit and own > self.limit // max(self.runs, 1)


@dataclass
class RunEvent:
    """Something that happened. text: untrusted, one line."""

    number: int
    at: float
    """Seconds since 1970."""
    step: int
    """The last step that was decided before."""
    kind: str
    text: str
    ranks: list[int] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return the event for JSON."""
        return dict(vars(self), at=round(self.at, 3))


class Marks:
    """Measurements of networks: loss, accuracy, test accuracy. At most `MOST_MARKS` of them.

    When there are too many, every second one goes, and later ones come half as often.
    """

    def __init__(self) -> None:
        self.arrays: list[array[Any]] = [array(kind) for kind in "BBqdf"]
        """Network and kind, as their places; step; seconds since 1970; value."""
        self.generation = 0
        self.spacing = 0.2
        """Seconds between two marks of a network's training."""
        self._due: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.arrays[0])

    def add(self, network: int, step: int, at: float, values: dict[str, float]) -> None:
        """Add what a rank has measured of a network; test accuracies are never left out."""
        if "test_accuracy" not in values:
            if at < self._due.get(network, 0.0):
                return
            self._due[network] = at + self.spacing
        for kind, value in values.items():
            row = (network, MARK_KINDS.index(kind), step, at, value)
            for column, number in zip(self.arrays, row, strict=True):
                column.append(number)
        if len(self) > MOST_MARKS:
            self._thin()

    def cut(self, step: int) -> None:
        """Remove what was measured at this step or later."""
        self._keep([place for place, s in enumerate(self.arrays[2]) if s < step])

    def _thin(self) -> None:
        seen: dict[tuple[int, int], int] = {}
        kept = []
        for place in range(len(self)):
            key = self.arrays[0][place], self.arrays[1][place]
            seen[key] = seen.get(key, 0) + 1
            if seen[key] % 2:
                kept.append(place)
        self.spacing *= 2
        self._keep(kept)

    def _keep(self, places: list[int]) -> None:
        if len(places) < len(self):
            self.generation += 1
            self.arrays = [array(c.typecode, [c[i] for i in places]) for c in self.arrays]


class RunHistory:
    """What one run has done. memory: shared by all runs; None: no other run shares it."""

    def __init__(self, plan: Plan, memory: HistoryMemory | None = None) -> None:
        self.plan = plan
        self.pairs, self.teachers = plan.topology.pairs, tuple(plan.teachers)
        self.networks = tuple(plan.topology)
        self.lock = threading.Lock()
        """Guards marks and events; never held for long."""
        self.rows_lock = threading.Lock()
        """Guards the columns."""
        self._waiting: deque[tuple[Decision, float]] = deque()
        """Decisions that are not in the columns yet."""
        self.events: deque[RunEvent] = deque(maxlen=MOST_EVENTS)
        self.event_count = 0
        self.marks = Marks()
        kinds = (*PAIR_KINDS * len(self.pairs), *("sum",) * (len(REASONS) * len(self.teachers)))
        self.columns = Columns(kinds, MOST_ROWS)
        self.columns.most = max(min(MOST_ROWS, RUN_BYTES // self.columns.row_bytes), LEAST_ROWS)
        self._memory = memory or HistoryMemory(2**62)
        self._memory.runs += 1
        self._accounted = 0
        self.kept_at = -math.inf
        """When it was last written to a journal, in seconds of the caller's clock."""
        self.step = 0
        """The last step that was added."""

    @property
    def version(self) -> tuple[int, ...]:
        """Numbers that change whenever the history does, but within a row."""
        columns, marks = self.columns, self.marks
        return columns.generation, len(columns), marks.generation, len(marks), self.event_count

    @property
    def size(self) -> int:
        """Memory in bytes, about."""
        events = sum(EVENT_BYTES + len(event.text) for event in self.events)
        return len(self.columns) * self.columns.row_bytes + len(self.marks) * 22 + events

    def add(self, decision: Decision, at: float | None = None) -> None:
        """Add a decision; its pairs are those of the plan.

        at: when it was made, in seconds since 1970; None: now, 0: not known.
        """
        self._waiting.append((decision, time.time() if at is None else at))
        self.step = max(self.step, decision.step)
        if len(self._waiting) > MOST_WAITING:
            self.take_in()

    def take_in(self) -> None:
        """Take waiting decisions into the columns. Any thread may call it."""
        with self.rows_lock:
            self.take_in_locked()

    def take_in_locked(self) -> None:
        """Take waiting decisions in, where `rows_lock` is held."""
        while self._waiting:
            decision, at = self._waiting.popleft()
            self.columns.add(decision.step, at, self._row_of(decision))
            self._account()
        self.columns.flush()

    def _row_of(self, decision: Decision) -> list[float]:
        numbers: list[float] = []
        for p in decision.pairs:
            d = p.distances
            is_learning = p.mode is Mode.LEARNING
            numbers += (d.gap, d.gap, d.gap, p.delta, d.e_s, d.e_t, is_learning)
        for reason in reasons(decision, self.teachers):
            counts = [0] * len(REASONS)
            counts[INDEX_OF[reason]] = 1
            numbers += counts
        return numbers

    def measure(
        self,
        network: str,
        step: int,
        loss: float | None = None,
        accuracy: float | None = None,
        test_accuracy: float | None = None,
    ) -> None:
        """Add a rank's progress on a network. accuracy, test_accuracy: from 0 to 1."""
        found = zip(MARK_KINDS, (loss, accuracy, test_accuracy), strict=True)
        values = {kind: value for kind, value in found if value is not None}
        if values:
            with self.lock:
                place = self.networks.index(network)
                self.marks.add(place, max(0, min(step, 2**62)), time.time(), values)

    def note(self, kind: str, text: str, rank: int | None = None) -> None:
        """Add an event. kind: a word for it. rank: whom it is about."""
        now = time.time()
        with self.lock:
            last = self.events[-1] if self.events else None
            self.event_count += 1
            if last and rank is not None and _go_together(last, kind, now):
                last.number = self.event_count  # who has seen it before gets it again
                if rank not in last.ranks:
                    last.ranks.append(rank)
                return
            text = sentence(text, EVENT_LETTERS)
            ranks = [] if rank is None else [rank]
            self.events.append(RunEvent(self.event_count, now, self.step, kind, text, ranks))

    def cut(self, step: int) -> None:
        """Remove this step and those after it: the run does them again."""
        with self.rows_lock:
            self.take_in_locked()
            self.columns.cut(step)
            self._account()
        with self.lock:
            self.step = min(self.step, max(step - 1, 0))
            self.marks.cut(step)

    def close(self) -> None:
        """Give the memory back, because the run is forgotten."""
        self._memory.used -= self._accounted
        self._memory.runs -= 1
        self._accounted = 0

    def _account(self) -> None:
        """Tell the memory of all runs what this one takes; take less if it is too much."""
        columns = self.columns
        own = len(columns) * columns.row_bytes
        if own == self._accounted:
            return
        if self._memory.is_short(own) and len(columns) > LEAST_ROWS:
            columns.halve()
            own = len(columns) * columns.row_bytes
        self._memory.used += own - self._accounted
        self._accounted = own

    def document(self, since: tuple[int, ...] = ()) -> dict[str, Any]:
        """Return the history for JSON, or what is new since an earlier document.

        since: the `cursor` of the earlier one; the answer says where its rows begin (`from`).
        """
        with self.rows_lock, self.lock:
            self.take_in_locked()
            version = self.version
            generation, rows, mark_generation, marks, events = _known(since, version)
            start = max(rows - 1, 0) if generation == version[0] else 0
            first = marks if mark_generation == version[2] else 0
            arrays = [column[start:] for column in self.columns.arrays]
            mark_arrays = [column[first:] for column in self.marks.arrays]
            found = [event.document() for event in self.events if event.number > events]
            stride = self.columns.stride
        names = [len(self.pairs), len(self.teachers)]
        return {
            "cursor": ".".join(map(str, version)),
            "from": start,
            "stride": stride,
            "step": arrays[STEP].tolist(),
            "time": [round(at, 2) for at in arrays[1]],
            "count": arrays[2].tolist(),
            "pairs": [self._pair(arrays, place) for place in range(names[0])],
            "teachers": [self._teacher(arrays, place) for place in range(names[1])],
            "networks": list(self.networks),
            "marks_from": first,
            "marks": {
                "network": mark_arrays[0].tolist(),
                "kind": [MARK_KINDS[kind] for kind in mark_arrays[1]],
                "step": mark_arrays[2].tolist(),
                "time": [round(at, 2) for at in mark_arrays[3]],
                "value": _numbers(mark_arrays[4]),
            },
            "events": found,
        }

    def _pair(self, arrays: list[array[Any]], place: int) -> dict[str, Any]:
        pair, start = self.pairs[place], FIRST + place * len(PAIR_KINDS)
        columns = zip(PAIR_NAMES, arrays[start : start + len(PAIR_KINDS)], strict=True)
        numbers = {name: _numbers(column) for name, column in columns}
        return {"teacher": pair.teacher, "student": pair.student, **numbers}

    def _teacher(self, arrays: list[array[Any]], place: int) -> dict[str, Any]:
        start = FIRST + len(self.pairs) * len(PAIR_KINDS) + place * len(REASONS)
        columns = zip(REASONS, arrays[start : start + len(REASONS)], strict=True)
        counts = {reason: column.tolist() for reason, column in columns if any(column)}
        return {"name": self.teachers[place], "reasons": counts}


def _go_together(last: RunEvent, kind: str, now: float) -> bool:
    """Whether an event of one more rank belongs to the last event."""
    return last.kind == kind and bool(last.ranks) and now - last.at < TOGETHER_SECONDS


def history_of_start(
    before: RunHistory | None, plan: Plan, epoch: int, memory: HistoryMemory
) -> RunHistory:
    """Return the history of a run's start; that of the start before goes on.

    before: None for the first start. epoch: number of the start.
    """
    old = (before.networks, before.pairs) if before else ()
    if before is None or old != (tuple(plan.topology), plan.topology.pairs):
        if before:
            before.close()
        history = RunHistory(plan, memory)
        history.note("new", f"start {epoch}" if epoch > 1 else "")
        return history
    before.cut(plan.first_step)
    before.note("restart", f"start {epoch}, from step {plan.first_step} on")
    return before


def _known(since: tuple[int, ...], version: tuple[int, ...]) -> tuple[int, ...]:
    """Return what the reader has; nothing of it counts if it cannot be of this history."""
    if len(since) != len(version) or any(since[i] > version[i] for i in (0, 2, 4)):
        return (-1, 0, -1, 0, 0)
    rows = since[1] if since[1] <= version[1] else 0
    return since[0], rows, since[2], min(since[3], version[3]), since[4]


def _numbers(column: array[Any]) -> list[Any]:
    """Return numbers with six decimals, of a float32; None for one that JSON cannot hold."""
    if column.typecode == "I":
        return column.tolist()
    return [round(value, 6) if abs(value) < 1e30 else None for value in column]
