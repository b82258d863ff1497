"""A model of the journal. What is not synced is lost in a crash; a flipped bit damages a row.

Not covered: SQLite itself (`tests/services/test_journal.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from switokd.distillation.decision import Decision
from switokd.distillation.overrides import Stamped
from switokd.services.coordinator.journal import Journal
from switokd.services.coordinator.journal_file import StoredRun
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
    commands: dict[str, Stamped] = field(default_factory=dict)
    is_damaged: bool = False
    """Whether the run's own row is damaged, which does not touch its decisions."""

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
    secrets: dict[str, bytes] = field(default_factory=dict)
    is_full: bool = False

    def rows(self, run_id: str) -> Iterable[Decision | None]:
        """Return the rows of a run."""
        run = self.runs.get(run_id)
        return run.rows.values() if run else ()

    def flip(self, step: int) -> None:
        """Damage a row."""
        for run in self.runs.values():
            if step in run.rows:
                run.rows[step] = None

    def remove_damaged(self) -> list[int]:
        """Do what opening the journal does to a damaged run; return the steps that are lost."""
        lost = [step for run in self.runs.values() if run.is_damaged for step in run.rows]
        self.runs = {name: run for name, run in self.runs.items() if not run.is_damaged}
        return lost


class DiskJournal(Journal):
    """The journal of one coordinator process."""

    keeps = True

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._pending: list[Callable[[], None]] = []
        self._secrets = dict(disk.secrets)
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

    def begin(self, run_id: str, epoch: int, plan: Plan, started: float = 0.0) -> None:
        def write() -> None:
            before = self._disk.runs.get(run_id)
            if before and before.epoch == epoch:
                before.has_ended = before.is_damaged = False
                return
            rows = dict(before.rows) if before else {}
            rows = {step: row for step, row in rows.items() if step < plan.first_step}
            commands = before.commands if before else {}
            settled = plan.first_step - 1
            self._disk.runs[run_id] = DiskRun(epoch, plan, settled, rows=rows, commands=commands)

        self._pending.append(write)

    def note_secret(self, run_id: str, digest: bytes) -> None:
        self._secrets[run_id] = digest
        self._pending.append(lambda: self._disk.secrets.update({run_id: digest}))

    def secret_digest(self, run_id: str) -> bytes:
        return self._secrets.get(run_id, b"")

    def add(self, run_id: str, decision: Decision, alone: bool = False) -> None:
        self._pending.append(lambda: self._disk.runs[run_id].rows.update({decision.step: decision}))

    def add_command(self, run_id: str, stamped: Stamped) -> None:
        def write() -> None:
            self._disk.runs[run_id].commands[stamped.command.id] = stamped

        self._pending.append(write)

    def settle(self, run_id: str, epoch: int, step: int) -> None:
        self._change(run_id, epoch, "settled", step)

    def end(self, run_id: str, epoch: int, failure: str) -> None:
        self._change(run_id, epoch, "has_ended", True)

    def _change(self, run_id: str, epoch: int, name: str, value: int) -> None:
        def write() -> None:
            run = self._disk.runs[run_id]
            if run.epoch == epoch and not run.is_damaged:
                setattr(run, name, value)

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
            commands = list(run.commands.values())
            yield StoredRun(
                run_id, run.epoch, run.plan, run.settled, decisions, found, commands=commands
            )
