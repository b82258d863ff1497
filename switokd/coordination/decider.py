"""The protocol of whoever decides which teachers pause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from switokd.distillation.decision import Decision
from switokd.distillation.distances import (
    Parts,
)
from switokd.distillation.topology import Pair


class Decider(Protocol):
    """Who adds up the distances and decides."""

    @property
    def pairs(self) -> Sequence[Pair]:
        """Pairs that this rank measures: all that it takes to foresee its teachers' decisions."""
        ...

    def report(self, step: int, parts: Parts, exchange_seconds: float | None) -> None:
        """Hand in this rank's part of a step; does not wait for its decision."""

    def decide_early(self, step: int, parts: Parts) -> Decision | None:
        """Give the decision of this rank's pairs before the authority does, if it is certain."""
        ...

    def decision(self, step: int) -> Decision:
        """Wait for the authority's decision."""
        ...
