"""Up to which step each rank of a run has received decisions, and the lowest of these steps.

The lowest one is looked for only when the last rank leaves it: once per step, not per report.

Not covered: the decisions themselves (`rounds.py`).
"""

from __future__ import annotations

from collections.abc import Iterable


class ReceivedSteps:
    """Last received step by rank; None for a rank that needs no decision again."""

    def __init__(self, ranks: Iterable[int], step: int) -> None:
        self._step_of: dict[int, int | None] = dict.fromkeys(ranks, step)
        self._lowest: int | None = None
        self._count = 0
        self._find()

    @property
    def lowest(self) -> int | None:
        """The lowest of the steps; None if no rank needs a decision again."""
        return self._lowest

    def note(self, rank: int, step: int | None) -> None:
        """Note the last step that a rank has received."""
        before = self._step_of[rank]
        if before == step:
            return
        self._step_of[rank] = step
        lowest = self._lowest
        if step is not None and (lowest is None or step < lowest):
            self._lowest, self._count = step, 1
            return
        if step == lowest:
            self._count += 1
        elif before == lowest:
            self._count -= 1
            if not self._count:
                self._find()

    def _find(self) -> None:
        steps = [step for step in self._step_of.values() if step is not None]
        self._lowest = min(steps, default=None)
        self._count = steps.count(self._lowest) if self._lowest is not None else 0
