"""L1 distances between predictions, summed over the shards of a batch.

    gap  |p_s - p_t|_1      e_s  |p_s - y|_1      e_t  |p_t - y|_1

with p = softmax(z / tau). Source: Qian et al., ECCV 2022, arXiv:2209.04996, the section on the
distillation gap.

Not covered: the threshold (`gap.py`), the decision (`decision.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from switokd.distillation.gap import Distances, PairSums, total
from switokd.distillation.topology import Pair

GRID = 2.0**-30
"""Less than the rounding error of a distance in float32; sums are exact up to 2^23."""

Parts = Mapping[Pair, Sequence[PairSums]]
"""By pair: the sums over each shard of the teacher, in rank order."""


def pair_sums(
    pairs: Sequence[Pair],
    logits: Mapping[str, Tensor],
    y: Tensor,
    shards: Mapping[str, Sequence[slice]],
    taus: Mapping[Pair, float],
    exact: bool = False,
) -> Tensor:
    """Sum the three L1 distances of each pair over each shard of the pair's teacher.

    logits: `[B, C]` by network. y: labels `[B]` (integers) or target distributions `[B, C]`.
    shards: slices of the batch, by teacher. taus: temperatures. Returns a float64 tensor
    `[shards of all pairs, 3]` on the logits' device: pair by pair, columns G, e_s, e_t.
    Distances are computed in float32 and added up in float64. exact: see `on_grid`.
    """
    p: dict[tuple[str, float], Tensor] = {}
    e: dict[tuple[str, float], Tensor] = {}
    for pair in pairs:
        for key in ((pair.teacher, taus[pair]), (pair.student, taus[pair])):
            if key not in p:
                p[key] = soften(logits[key[0]].float(), taus[pair]).softmax(dim=1)
                e[key] = _distance_to_target(p[key], y)
    rows = []
    for pair in pairs:
        t, s = (pair.teacher, taus[pair]), (pair.student, taus[pair])
        gap = (p[s] - p[t]).abs().sum(dim=1)
        per_sample = torch.stack((gap, e[s], e[t])).double()  # [3, B]
        per_sample = on_grid(per_sample) if exact else per_sample
        rows += [per_sample[:, shard].sum(dim=1) for shard in shards[pair.teacher]]
    device = next(iter(logits.values())).device
    return torch.stack(rows) if rows else torch.empty(0, 3, dtype=torch.float64, device=device)


def on_grid(values: Tensor, grid: float = GRID) -> Tensor:
    """Round float64 values to multiples of `grid`, a power of two.

    Their sums are then exact, up to 2^53 times `grid`: the order of the additions has no effect.
    """
    return (values / grid).round() * grid


def soften(z: Tensor, tau: float) -> Tensor:
    """Logits divided by the temperature, z / tau.

    A division by 1 is skipped: launching a small kernel on a GPU costs more than its arithmetic.
    """
    return z if tau == 1 else z / tau


def _distance_to_target(p: Tensor, y: Tensor) -> Tensor:
    """L1 distance `[B]` between predictions p `[B, C]` and labels `[B]` or targets `[B, C]`."""
    if y.dim() == 1:  # one-hot: |p - y|_1 = (1 - p_label) + (sum of the others) = 2 (1 - p_label)
        return 2 * (1 - p.gather(1, y[:, None]).squeeze(1))
    return (p - y).abs().sum(dim=1)


def count_correct(logits: Mapping[str, Tensor], y: Tensor, shards: Mapping[str, slice]) -> Tensor:
    """Number of samples that each network classifies correctly: float64, `[len(shards)]`.

    logits, y: as for `pair_sums`. shards: by network, the slice of the batch to count in.
    """
    labels = y if y.dim() == 1 else y.argmax(dim=1)
    correct = [(logits[name][at].argmax(dim=1) == labels[at]).sum() for name, at in shards.items()]
    return torch.stack(correct).double()


def as_parts(
    pairs: Sequence[Pair], shards: Mapping[str, Sequence[slice]], sums: Sequence[Sequence[float]]
) -> Parts:
    """Group the rows of `pair_sums`, copied to the host, by pair and shard."""
    rows = iter(sums)

    def part(shard: slice) -> PairSums:
        gap, e_s, e_t = next(rows)
        return PairSums(gap, e_s, e_t, shard.stop - shard.start)

    return {pair: [part(shard) for shard in shards[pair.teacher]] for pair in pairs}


def means(parts: Parts) -> dict[Pair, Distances]:
    """Means of each pair over the whole batch, from the sums of its shards in rank order."""
    return {pair: total(of_pair).mean() for pair, of_pair in parts.items()}


def to_host(
    health: Tensor, sums: Tensor, correct: Tensor
) -> tuple[list[float], list[list[float]], list[float]]:
    """Copy three tensors from the device at once; returns lists, `sums` as a list of rows."""
    numbers: list[float] = torch.cat([health, sums.flatten(), correct]).tolist()
    begin, end = len(health), len(health) + sums.numel()
    return numbers[:begin], [numbers[i : i + 3] for i in range(begin, end, 3)], numbers[end:]
