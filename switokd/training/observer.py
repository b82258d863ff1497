"""The interface between a training loop and everything that watches the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from switokd.config.config import Config
from switokd.distillation.decision import Decision
from switokd.training.metrics import EpochMetrics
from switokd.training.step import StepResult


@dataclass(frozen=True)
class ObservedRun:
    """What an observer may know of the run that it watches."""

    id: str
    """The same for each start of the run, different for each run."""
    folder: Path
    """The run folder."""
    config: Config
    """The effective configuration."""
    step: int
    """The step after which this process continues; 0: the run is new."""
    steps: int
    """Number of steps of the whole run."""


class Observer(Protocol):
    """Receives the events of a training, on rank 0.

    Each method does nothing here; a subclass overrides those that it needs. Methods of a user's
    observer are never called at the same time; they delay the training while they run. What
    follows an exception is the setting `tracking.on_error`; an exception of the package's own
    observers ends the run.
    """

    def on_run(self, run: ObservedRun) -> None:
        """Learn of the run, before all other events."""
        return

    def on_begin(self) -> None:
        """Learn that everything is ready, and the first step of this process follows."""
        return

    def on_decision(self, decision: Decision) -> None:
        """Receive a step's decision, in the order of the steps.

        The decider calls this on a thread of its own, before or after `on_step` of the same step.
        """
        return

    def on_step(self, step: int, epoch: int, result: StepResult) -> None:
        """Receive a step's result; steps are counted from 1, epochs from 0."""
        return

    def on_skipped(self, step: int, reason: str) -> None:
        """Receive a step that no network has applied, instead of its result."""
        return

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Receive an epoch's metrics, after its evaluation."""
        return

    def on_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """Receive the state of the whole run after `step`, to be saved; must not wait for a disk.

        state: tensors, numbers, texts, lists and dicts, as in `checkpoint.py`.
        """
        return

    def settle(self) -> None:
        """Wait until everything received is saved; the run ends."""
        return

    def on_weights(self, folder: str, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Receive networks' state dicts by file name, and the folder that they belong to.

        folder: weights/initial, weights/best or weights, relative to the run folder.
        """
        return

    def on_end(self, error: BaseException | None) -> None:
        """Learn that this process trains no more; no other event follows.

        error: why the run ends early, such as a signal; None: it has finished, and its summary
        is written.
        """
        return
