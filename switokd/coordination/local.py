"""Deciding in the training process itself, for `coordinator: off`: one process, no coordinator.

The same interface as `client.py`, the same pure function, the same record; no metrics, since
nobody serves them.

Not covered: several processes, which would have to trust each other's rounding.
"""

from __future__ import annotations

from collections.abc import Callable

from switokd.config.config import Config
from switokd.distillation.decision import Decision, decide
from switokd.distillation.distances import Parts, means
from switokd.errors import SwitokdError


class LocalDecider:
    """Decides every step at once."""

    def __init__(self, config: Config, on_decision: Callable[[Decision], None]) -> None:
        self.pairs = list(config.topology.pairs)
        self.waits: list[float] = []
        self._rule = config.method.rule
        self._on_decision = on_decision
        self._last: Decision | None = None
        self._recorded = 0

    def report(self, step: int, parts: Parts, exchange_seconds: float | None = None) -> None:
        """Decide a step. It is recorded when backward is on its way, as a file may take long."""
        self._record()  # the step before, in which nobody has waited for it
        self._last = decide(step, means(parts), self._rule)

    def decide_early(self, step: int, parts: Parts) -> Decision | None:
        """Give the decision, which there is already."""
        return self._last

    def decision(self, step: int) -> Decision:
        """The decision of `step`, the newest reported."""
        assert self._last is not None
        assert self._last.step == step
        self._record()
        return self._last

    def _record(self) -> None:
        if self._last is not None and self._last.step > self._recorded:
            self._recorded = self._last.step
            self._on_decision(self._last)

    def progress(
        self,
        network: str,
        samples: int,
        loss: float | None = None,
        accuracy: float | None = None,
        test_accuracy: float | None = None,
    ) -> None:
        """Nobody serves metrics here."""

    def why(self, doing: str = "", patience: float = 3.0) -> SwitokdError | None:
        """Nobody else can know of a failure."""
        return None

    def close(self, failure: str = "") -> None:
        """Nobody to say goodbye to."""
