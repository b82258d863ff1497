"""Decides in the training process, for `coordinator: off`: one process, no coordinator.

`LocalDecider` has the methods of `Client`, calls the same pure function and writes the same
decision log. There are no metrics.

Not covered: several processes, because two processors may round differently.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from switokd.config.config import Config
from switokd.coordination.commands import Commands
from switokd.coordination.progress import NetworkProgress
from switokd.distillation.decision import Decision, decide
from switokd.distillation.distances import Parts, means


class LocalDecider:
    """Decides every step as soon as it is reported.

    on_decision: called for every decision, in order, in `report` and `decision`.
    """

    has_metrics = False

    def __init__(self, config: Config, on_decision: Callable[[Decision], None]) -> None:
        self.pairs = list(config.topology.pairs)
        self.waits: list[float] = []
        self.alone_steps: list[int] = []
        self.commands = Commands(config)
        self.start = f"{config.name}-{uuid.uuid4().hex[:6]}", 1
        self._rule = config.method.rule
        self._on_decision = on_decision
        self._last: Decision | None = None
        self._published = 0

    def report(self, step: int, parts: Parts, exchange_seconds: float | None = None) -> None:
        """Decide a step. parts: by pair, the sums over the whole batch.

        `on_decision` runs later, in `decision`, because it may write a file: the backward pass has
        begun by then. exchange_seconds is ignored.
        """
        self._publish()  # the previous step, unless `decision` has published it
        in_force = self.commands.overrides.at(step)
        self._last = decide(step, means(parts), self._rule, in_force=in_force)

    def decide_early(self, step: int, parts: Parts) -> Decision | None:
        """Return the decision of the last reported step."""
        return self._last

    def decision(self, step: int) -> Decision:
        """Publish and return the decision of `step`, the last reported step."""
        assert self._last is not None
        assert self._last.step == step
        self._publish()
        return self._last

    def settle(self, step: int) -> None:
        """Publish the decision of `step`."""
        self.decision(step)

    def _publish(self) -> None:
        if self._last is not None and self._last.step > self._published:
            self._published = self._last.step
            self._on_decision(self._last)

    def progress(self, progress: NetworkProgress) -> None:
        """Do nothing: there are no metrics."""

    def stall(self, doing: str) -> None:
        """Do nothing: there is no other rank to wait for."""

    def close(self, failure: str = "") -> None:
        """Do nothing: there is no connection."""
