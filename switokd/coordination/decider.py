"""The interface between a training loop and the part that decides which teachers pause.

Not covered: how a decision is made (`distillation/decision.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from switokd.coordination.commands import Commands
from switokd.coordination.progress import NetworkProgress
from switokd.distillation.decision import Decision
from switokd.distillation.distances import Parts
from switokd.distillation.topology import Pair


class Decider(Protocol):
    """Decides, step by step, which teachers pause.

    `Client` asks the coordinator. `LocalDecider` decides in the training process.
    """

    @property
    def has_metrics(self) -> bool:
        """Whether anyone reads what `progress` sends."""
        ...

    @property
    def pairs(self) -> Sequence[Pair]:
        """Pairs that this rank measures: enough to decide early about its own teachers."""
        ...

    @property
    def waits(self) -> Sequence[float]:
        """Seconds that this rank has waited for the decision of each step."""
        ...

    @property
    def alone_steps(self) -> Sequence[int]:
        """Steps that this rank has decided because the coordinator was late or lost."""
        ...

    @property
    def start(self) -> tuple[str, int]:
        """The run's id, and how often its processes were started; the same on all ranks."""
        ...

    @property
    def commands(self) -> Commands:
        """The commands of the run: those that were taken, and on rank 0 those that wait."""
        ...

    def report(self, step: int, parts: Parts, exchange_seconds: float | None = None) -> None:
        """Send this rank's distances of `step`; does not wait for the decision.

        exchange_seconds: duration of the step's exchange, for the metrics; None: not measured.
        """

    def decide_early(self, step: int, parts: Parts) -> Decision | None:
        """Decide about this rank's pairs before the decision arrives; None if that is not safe."""
        ...

    def decision(self, step: int) -> Decision:
        """Wait for the decision of `step`, which must be the last reported step."""
        ...

    def settle(self, step: int) -> None:
        """Have the record complete up to `step`, the last reported one; all ranks together."""

    def progress(self, progress: NetworkProgress) -> None:
        """Send a network's numbers for the live metrics; does not wait."""

    def stall(self, doing: str) -> None:
        """Report that this rank waits too long for the other ranks; `doing` names the operation."""

    def close(self, failure: str = "") -> None:
        """Leave the run after the last decision was written.

        failure: why this rank failed; empty if it did not fail.
        """
