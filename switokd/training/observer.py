"""The interface between a training loop and everything that watches the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from switokd.distillation.decision import Decision
from switokd.training.metrics import EpochMetrics
from switokd.training.step import StepResult


class Observer(Protocol):
    """Receives the events of a training, on rank 0.

    Each method does nothing here; a subclass overrides those that it needs. An exception ends the
    run.
    """

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
