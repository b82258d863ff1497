"""Distances of a teacher-student pair, and the switching threshold computed from them.

    G        = mean over the batch of |p_s - p_t|_1      distillation gap
    e_s, e_t = mean over the batch of |p_s - y|_1, |p_t - y|_1
    epsilon  = exp(-e_t / (e_s + e_t))
    delta    = e_s - epsilon * e_t                       adaptive switching threshold

Source: Qian et al., ECCV 2022, arXiv:2209.04996, the sections on the distillation gap and on the
adaptive switching threshold.

These are pure functions of numbers. `distances.py` computes the sums from tensors.

Not covered: the decision (`decision.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class PairSums(NamedTuple):
    """Sums of a pair's three L1 distances over `n` samples.

    Not a dataclass: the coordinator makes thousands of them per step, at a third of the cost.
    """

    gap: float
    e_s: float
    e_t: float
    n: int

    def __add__(self, other: PairSums) -> PairSums:  # type: ignore[override]
        """Sums over the samples of both; not a longer tuple."""
        return PairSums(
            self.gap + other.gap, self.e_s + other.e_s, self.e_t + other.e_t, self.n + other.n
        )

    def mean(self) -> Distances:
        """Means over the samples. ZeroDivisionError if there are no samples."""
        return Distances(self.gap / self.n, self.e_s / self.n, self.e_t / self.n, self.n)


def total(parts: Sequence[PairSums]) -> PairSums:
    """Add the sums of a pair's parts in a tree: ((a + b) + (c + d)) + e.

    The coordinator adds in the same tree while the parts come in (`totals.py`), so both have the
    same bits. IndexError if there are no parts.
    """
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [a + b for a, b in pairs] + list(parts[len(parts) & ~1 :])
    return parts[0]


@dataclass(frozen=True)
class Distances:
    """G, e_s and e_t of a pair: means over a batch of `n` samples, each between 0 and 2."""

    gap: float
    e_s: float
    e_t: float
    n: int


def epsilon(d: Distances) -> float:
    """Weight of e_t in the threshold, between exp(-1) and 1."""
    total = d.e_s + d.e_t
    return math.exp(-d.e_t / total) if total > 0 else 1.0


def delta(d: Distances, eps: float | None = None) -> float:
    """Adaptive switching threshold, between e_s - e_t and e_s.

    eps: epsilon to use; None computes epsilon from `d`.
    """
    return d.e_s - (epsilon(d) if eps is None else eps) * d.e_t
