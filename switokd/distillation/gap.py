"""Distances between predictions, and the switching threshold made of them.

    G        = mean over the batch of |p_s - p_t|_1      the distillation gap
    e_s, e_t = mean over the batch of |p_s - y|_1, |p_t - y|_1
    epsilon  = exp(-e_t / (e_s + e_t))
    delta    = e_s - epsilon * e_t                       the adaptive switching threshold

Source: Qian et al., ECCV 2022, arXiv:2209.04996, the sections on the distillation gap and on the
adaptive switching threshold.

Pure functions. The coordinator, which has no torch, uses `epsilon` and `delta`: the sums over
tensors are in `distances.py`.

Not covered: what follows from the numbers (`decision.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PairSums:
    """Sums over `n` samples of one pair's three L1 distances."""

    gap: float
    e_s: float
    e_t: float
    n: int

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(
            self.gap + other.gap, self.e_s + other.e_s, self.e_t + other.e_t, self.n + other.n
        )

    def mean(self) -> Distances:
        """Means over the samples; ZeroDivisionError if there are none."""
        return Distances(self.gap / self.n, self.e_s / self.n, self.e_t / self.n, self.n)


@dataclass(frozen=True)
class Distances:
    """Means over the `n` samples of a batch, each in [0, 2]: G, e_s and e_t of one pair."""

    gap: float
    e_s: float
    e_t: float
    n: int


def epsilon(d: Distances) -> float:
    """Weight of the teacher's distance in the threshold, in [exp(-1), 1]."""
    total = d.e_s + d.e_t
    return math.exp(-d.e_t / total) if total > 0 else 1.0


def delta(d: Distances, eps: float | None = None) -> float:
    """Adaptive switching threshold, between e_s - e_t and e_s; `eps` is epsilon, None: its own."""
    return d.e_s - (epsilon(d) if eps is None else eps) * d.e_t
