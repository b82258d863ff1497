"""Rank 0's progress bar, and the share of paused steps that the bar shows.

Not covered: the measurements (`meters.py`), the closing table (`summary.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from switokd.distillation.decision import Decision
from switokd.distillation.topology import Topology
from switokd.training.metrics import EpochMetrics
from switokd.training.observer import Observer
from switokd.training.step import StepResult


@dataclass
class PausedShare:
    """Counts the teachers' paused steps."""

    topology: Topology
    steps: int = 0
    paused: dict[str, int] = field(default_factory=dict)
    """Number of paused steps by teacher."""

    def add(self, step: int, teachers: Iterable[str]) -> None:
        """Count one step with its paused teachers."""
        self.steps = step
        for teacher in teachers:
            self.paused[teacher] = self.paused.get(teacher, 0) + 1

    @property
    def share(self) -> float:
        """Paused steps of all teachers over all steps of all teachers, from 0 to 1."""
        teacher_steps = self.steps * len(self.topology.teachers)
        return sum(self.paused.values()) / teacher_steps if teacher_steps else 0.0


class ProgressBar(Observer):
    """Shows images per second, remaining time, the first student's loss and accuracy, and pauses.

    If the output is not a terminal, lines replace the bar: one per epoch, and one every 30 s.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        epochs: int,
        topology: Topology,
        paused: Mapping[int, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """paused: paused teachers of the steps before, if the run continues."""
        self.console = Console(highlight=False, soft_wrap=True)
        self._steps, self._epochs, self._paused = steps, epochs, PausedShare(topology)
        for step, teachers in paused.items():
            self._paused.add(step, teachers)
        self._student = topology.students[0]
        self._shown = time.monotonic()
        self._started: float | None = None
        self._samples = 0
        # The columns fit into 80 characters.
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=5,
        )
        self._task = self._progress.add_task(name, total=steps, numbers="")
        self._interval = 0.2 if self.console.is_terminal else 30.0

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def on_decision(self, decision: Decision) -> None:
        """Count the teachers that the decision pauses."""
        self._paused.add(decision.step, decision.paused)

    def on_step(self, step: int, epoch: int, result: StepResult) -> None:
        """Show the step if the last shown step is old enough."""
        now = time.monotonic()
        if self._started is None:  # an epoch's first step: do not count the evaluation before it
            self._started = now
        else:
            self._samples += len(result.y)
        if now - self._shown < self._interval and step < self._steps:
            return
        self._shown = now
        z, y = result.logits[self._student], result.y
        loss = F.cross_entropy(z, y).item()
        accuracy = (z.argmax(dim=1) == result.labels).float().mean().item()
        rate = self._samples / max(now - self._started, 1e-9)
        numbers = (
            f"{rate:,.0f} images/s student loss {loss:.3f} top-1 {accuracy:.0%} "
            f"paused {self._paused.share:.0%}"
        )
        self._progress.update(self._task, completed=step, numbers=numbers)
        if self._progress.disable and rate and step < self._steps:
            left = len(y) * (self._steps - step) / rate
            position = f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}"
            self.console.print(f"{position}  {left:.0f} s left  {numbers}")

    def on_skipped(self, step: int, reason: str) -> None:
        """Print one line."""
        self.console.print(f"step {step} is skipped: {reason}", markup=False)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Print one line for the epoch, with the networks' test accuracies if there was a test."""
        self._started, self._samples = None, 0
        top1 = "  ".join(f"{name} {value / 100:.1%}" for name, value in metrics.test_top1.items())
        tested = f"test top-1  {top1}" if top1 else "not tested"
        self._progress.console.print(
            f"epoch {metrics.epoch + 1:>3}/{self._epochs}  {tested}  "
            f"paused {self._paused.share:.0%}"
        )
