"""A model of the journal. What is not synced is lost in a crash; a flipped bit damages a row.

Not covered: SQLite itself (`tests/services/test_journal.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from switokd.distillation.decision import Decision
from switokd.services.coordinator.journal import Journal, StoredRun
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.steps import StepSet


@dataclass
class DiskRun:
    """A run on the disk."""

    epoch: int
    plan: Plan
    settled: int
    has_ended: bool = False
    rows: dict[int, Decision | None] = field(default_factory=dict)
    """None: damaged."""

    @property
    def recorded(self) -> int:
        steps = StepSet()
        steps.add(self.plan.first_step - 1)
        for step in self.rows:
            if step >= self.plan.first_step:
                steps.add(step)
        return steps.last_before_gap


@dataclass
class Disk:
    """What survives a crash."""

    runs: dict[str, DiskRun] = field(default_factory=dict)
    is_full: bool = False

    def rows(self, run_id: str) -> Iterable[Decision | None]:
        """Return the rows of a run."""
        return self.runs[run_id].rows.values()

    def flip(self, step: int) -> None:
        """Damage a row."""
        for run in self.runs.values():
            if step in run.rows:
                run.rows[step] = None


class DiskJournal(Journal):
    """The journal of one coordinator process."""

    keeps = True

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._pending: list[Callable[[], None]] = []
        self._note()

    def commit(self) -> None:
        """Put everything on the disk, unless it is full."""
        if self._disk.is_full:
            return
        for write in self._pending:
            write()
        self._pending.clear()
        self._note()

    def _note(self) -> None:
        self._recorded = {name: (run.epoch, run.recorded) for name, run in self._disk.runs.items()}

    def begin(self, run_id: str, epoch: int, plan: Plan) -> None:
        def write() -> None:
            before = self._disk.runs.get(run_id)
            if before and before.epoch == epoch:
                before.has_ended = False
                return
            rows = dict(before.rows) if before else {}
            rows = {step: row for step, row in rows.items() if step < plan.first_step}
            self._disk.runs[run_id] = DiskRun(epoch, plan, plan.first_step - 1, rows=rows)

        self._pending.append(write)

    def add(self, run_id: str, decision: Decision, alone: bool = False) -> None:
        self._pending.append(lambda: self._disk.runs[run_id].rows.update({decision.step: decision}))

    def settle(self, run_id: str, epoch: int, step: int) -> None:
        self._change(run_id, epoch, "settled", step)

    def end(self, run_id: str, epoch: int, failure: str) -> None:
        self._change(run_id, epoch, "has_ended", True)

    def _change(self, run_id: str, epoch: int, name: str, value: int) -> None:
        def write() -> None:
            if self._disk.runs[run_id].epoch == epoch:
                setattr(self._disk.runs[run_id], name, value)

        self._pending.append(write)

    def recorded(self, run_id: str, epoch: int) -> int:
        written, step = self._recorded.get(run_id, (None, 0))
        return step if written == epoch else 0

    def stored(self) -> Iterable[StoredRun]:
        for run_id, run in self._disk.runs.items():
            if run.has_ended:
                continue
            decisions, step = [], run.settled + 1
            while (row := run.rows.get(step)) is not None:
                decisions.append(row)
                step += 1
            first = run.plan.first_step
            found = sorted(s for s, row in run.rows.items() if first <= s < step and row)
            for damaged in [s for s, row in run.rows.items() if row is None]:
                del run.rows[damaged]
            yield StoredRun(run_id, run.epoch, run.plan, run.settled, decisions, found)
