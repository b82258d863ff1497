"""Finds ranks of one teacher that have applied different decisions, within one step.

Such ranks would go on with different weights. Each rank sends with the next exchange what its
teachers have applied, as one bit per pair; every rank compares.

Not covered: pairs after the first 50, whose bits float64 would not represent exactly. If only one
rank pauses the teacher, the sum of the teacher's gradients fails before the next exchange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from switokd.distillation.decision import Decision, Mode
from switokd.distillation.topology import Pair
from switokd.errors import PeerError
from switokd.runtime.placement import Placement

MOST_PAIRS = 50


class Agreement:
    """Compares the decisions of a teacher's ranks. pairs: all pairs, the same on every rank."""

    def __init__(self, placement: Placement, pairs: Sequence[Pair]) -> None:
        self._placement = placement
        self._bits = {pair: 1 << i for i, pair in enumerate(pairs[:MOST_PAIRS])}
        self.applied = 0
        """What this rank has applied in the last step; 0 before the first step."""

    def note(self, applied: Mapping[str, Decision]) -> None:
        """Note what this rank has applied. applied: its teachers' decisions, by teacher."""
        self.applied = sum(
            bit
            for pair, bit in self._bits.items()
            if pair.teacher in applied and applied[pair.teacher].mode(pair) is Mode.EXPERT
        )

    def check(self, step: int, applied: Sequence[int]) -> None:
        """PeerError if ranks of one teacher have applied different decisions in `step`.

        applied: by rank, `Agreement.applied` of this step.
        """
        if len(set(applied)) < 2:  # nearly always where all ranks hold the same teachers
            return
        for pair, bit in self._bits.items():
            first, *others = self._placement.ranks_of(pair.teacher)
            for rank in others:
                if applied[rank] & bit != applied[first] & bit:
                    raise PeerError(
                        f"ranks have parted: {self._placement.who(first)} and "
                        f"{self._placement.who(rank)} have applied different decisions for "
                        f"{pair.teacher} and {pair.student} at step {step}. Continue from the last "
                        "checkpoint"
                    )
