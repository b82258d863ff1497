"""Rank 0's progress bar, and the paused share that it shows.

Not covered: what is measured (`meters.py`), the closing table (`curves.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from switokd.distillation.decision import Decision
from switokd.distillation.topology import Topology
from switokd.training.step import StepResult


@dataclass
class PausedShare:
    """Counts the teachers' paused steps from the decisions, as they come in."""

    topology: Topology
    steps: int = 0
    paused: dict[str, int] = field(default_factory=dict)

    def add(self, decision: Decision) -> None:
        """Count one decision."""
        self.steps = decision.step
        for teacher in decision.paused:
            self.paused[teacher] = self.paused.get(teacher, 0) + 1

    @property
    def share(self) -> float:
        """Share of all teachers' steps so far that were paused, 0 to 1."""
        teacher_steps = self.steps * len(self.topology.teachers)
        return sum(self.paused.values()) / teacher_steps if teacher_steps else 0.0


class ProgressBar:
    """Rank 0's bar: rate, remaining time, the first student's loss and accuracy, paused share.

    Where output is no terminal, lines take the bar's place: one per epoch, and one every half
    minute in between.
    """

    def __init__(self, name: str, steps: int, epochs: int, paused: PausedShare) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._steps, self._epochs, self._paused = steps, epochs, paused
        self._student = paused.topology.students[0]
        self._shown = time.monotonic()
        self._started: float | None = None
        self._samples = 0
        # Fits into 80 columns.
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

    def step(self, step: int, epoch: int, result: StepResult) -> None:
        """Show one step, if it is time to."""
        now = time.monotonic()
        if self._started is None:  # the first step of an epoch: evaluation is not counted
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
            at = f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}"
            self.console.print(f"{at}  {left:.0f} s left  {numbers}")

    def epoch(self, epoch: int, test_top1: Mapping[str, float]) -> None:
        """Print one epoch's line; no accuracies: it was not tested."""
        self._started, self._samples = None, 0
        accuracies = "  ".join(f"{name} {top1:.1%}" for name, top1 in test_top1.items())
        tested = f"test top-1  {accuracies}" if accuracies else "not tested"
        self._progress.console.print(
            f"epoch {epoch + 1:>3}/{self._epochs}  {tested}  paused {self._paused.share:.0%}"
        )
