"""Warns of a network whose logits are the same for every image of an epoch: it learns no more.

Not covered: networks that give the same class for every image, but with different logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from switokd.training.metrics import EpochMetrics
from switokd.training.observer import Observer
from switokd.training.step import StepResult


class DeadNetworks(Observer):
    """Looks at each epoch's steps until one shows that the network lives, mostly the first step.

    names: the networks. on_warning: receives a sentence for the user.
    """

    def __init__(self, names: Iterable[str], on_warning: Callable[[str], None]) -> None:
        self._names, self._on_warning = tuple(names), on_warning
        self._suspects: set[str] = set()
        """Networks whose logits were the same for every image of the epoch so far."""
        self._is_new_epoch = True

    def on_step(self, step: int, epoch: int, result: StepResult) -> None:
        """Acquit the networks whose logits differ between the images of the batch."""
        if self._is_new_epoch:
            self._suspects, self._is_new_epoch = set(self._names), False
        for name in tuple(self._suspects):
            z = result.logits[name]
            if (z != z[:1]).any():
                self._suspects.remove(name)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Warn of the networks that remain."""
        for name in sorted(self._suspects):
            self._on_warning(
                f"network {name} has had the same logits for every image of a batch in all of "
                f"epoch {metrics.epoch + 1}: it learns nothing. The usual remedies are a lower "
                f"networks.{name}.optimizer.lr, or other initial weights"
            )
        self._suspects, self._is_new_epoch = set(), True
