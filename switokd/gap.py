"""Distances between predictions, and the switching threshold made of them.

    G        = mean over the batch of |p_s - p_t|_1      the distillation gap
    e_s, e_t = mean over the batch of |p_s - y|_1, |p_t - y|_1
    epsilon  = exp(-e_t / (e_s + e_t))
    delta    = e_s - epsilon * e_t                       the adaptive switching threshold

Source: Qian et al., ECCV 2022, arXiv:2209.04996, the sections on the distillation gap and on the
adaptive switching threshold.

Pure functions. The module needs tensors' methods only and does not import torch, because
the coordinator, which has no torch, uses `epsilon` and `delta`.

Not covered: what follows from the numbers (`decision.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def pair_sums(z_t: Tensor, z_s: Tensor, y: Tensor, tau: float) -> PairSums:
    """Sum one pair's L1 distances over the samples at hand.

    z_t, z_s: logits `[B, C]`. y: labels `[B]` (integers) or target distributions `[B, C]`.
    tau: temperature. Distances are taken in float32 or better and added up in float64.
    """
    p_t = (z_t.float() / tau).softmax(dim=1)
    p_s = (z_s.float() / tau).softmax(dim=1)
    gap = (p_s - p_t).abs().sum(dim=1)
    e_s, e_t = _distance_to_target(p_s, y), _distance_to_target(p_t, y)
    # One transfer to the host for all three, the step's only one besides the exchange's check.
    totals = p_t.new_zeros(3).double()
    for i, per_sample in enumerate((gap, e_s, e_t)):
        totals[i] = per_sample.double().sum()
    total_gap, total_e_s, total_e_t = totals.tolist()
    return PairSums(total_gap, total_e_s, total_e_t, n=len(y))


def _distance_to_target(p: Tensor, y: Tensor) -> Tensor:
    """L1 distance `[B]` of predictions `[B, C]` to the targets."""
    if y.dim() == 1:  # one-hot: |p - y|_1 = (1 - p_label) + (sum of the others) = 2 (1 - p_label)
        return 2 * (1 - p.gather(1, y[:, None]).squeeze(1))
    return (p - y).abs().sum(dim=1)


def epsilon(d: Distances) -> float:
    """Weight of the teacher's distance in the threshold, in [exp(-1), 1]."""
    total = d.e_s + d.e_t
    return math.exp(-d.e_t / total) if total > 0 else 1.0


def delta(d: Distances) -> float:
    """Adaptive switching threshold, between e_s - e_t and e_s."""
    return d.e_s - epsilon(d) * d.e_t
