"""L1 distances between predictions, summed over the parts of a batch.

    gap  |p_s - p_t|_1      e_s  |p_s - y|_1      e_t  |p_t - y|_1

Source: Qian et al., ECCV 2022, arXiv:2209.04996, the section on the distillation gap.

Not covered: means, threshold and what is decided on them (`gap.py`, `decision.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from switokd.distillation.gap import Distances, PairSums
from switokd.distillation.topology import Pair

Parts = Mapping[Pair, Sequence[PairSums]]
"""By pair: its sums over each shard of its teacher, in rank order."""


def pair_sums(
    pairs: Sequence[Pair],
    logits: Mapping[str, Tensor],
    y: Tensor,
    shards: Mapping[str, Sequence[slice]],
    taus: Mapping[Pair, float],
) -> Tensor:
    """Sum each pair's three L1 distances over each of its teacher's shards.

    logits: by network `[B, C]`. y: labels `[B]` (integers) or target distributions `[B, C]`.
    shards: by teacher, the parts of the batch. taus: temperatures. Returns float64 on the logits'
    device, `[shards of all pairs, 3]`, pair by pair, with G, e_s, e_t in that order. Distances
    are taken in float32 or better and added up in float64, so that a shard's sums are the same
    whoever holds the logits.
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
        rows += [per_sample[:, shard].sum(dim=1) for shard in shards[pair.teacher]]
    device = next(iter(logits.values())).device
    return torch.stack(rows) if rows else torch.empty(0, 3, dtype=torch.float64, device=device)


def soften(z: Tensor, tau: float) -> Tensor:
    """z / tau; by 1 nothing is divided, for a GPU's small kernels cost more than they compute."""
    return z if tau == 1 else z / tau


def _distance_to_target(p: Tensor, y: Tensor) -> Tensor:
    """L1 distance `[B]` of predictions `[B, C]` to the targets."""
    if y.dim() == 1:  # one-hot: |p - y|_1 = (1 - p_label) + (sum of the others) = 2 (1 - p_label)
        return 2 * (1 - p.gather(1, y[:, None]).squeeze(1))
    return (p - y).abs().sum(dim=1)


def count_correct(logits: Mapping[str, Tensor], y: Tensor, shards: Mapping[str, slice]) -> Tensor:
    """How many of its shard's samples each network has right, in float64, `[len(shards)]`.

    logits, y: as for `pair_sums`. shards: by network, the part of the batch that counts.
    """
    labels = y if y.dim() == 1 else y.argmax(dim=1)
    right = [(logits[name][at].argmax(dim=1) == labels[at]).sum() for name, at in shards.items()]
    return torch.stack(right).double()


def as_parts(
    pairs: Sequence[Pair], shards: Mapping[str, Sequence[slice]], sums: Sequence[Sequence[float]]
) -> Parts:
    """`pair_sums`' rows, once they are on the host, by pair and shard."""
    rows = iter(sums)

    def part(shard: slice) -> PairSums:
        gap, e_s, e_t = next(rows)
        return PairSums(gap, e_s, e_t, shard.stop - shard.start)

    return {pair: [part(shard) for shard in shards[pair.teacher]] for pair in pairs}


def means(parts: Parts) -> dict[Pair, Distances]:
    """Every pair's means over the whole batch, its parts added up in rank order."""
    return {pair: sum(rest, first).mean() for pair, (first, *rest) in parts.items()}


def to_host(
    health: Tensor, sums: Tensor, right: Tensor
) -> tuple[list[float], list[list[float]], list[float]]:
    """All three as lists, the sums by rows, by one copy from the device."""
    numbers: list[float] = torch.cat([health, sums.flatten(), right]).tolist()
    begin, end = len(health), len(health) + sums.numel()
    return numbers[:begin], [numbers[i : i + 3] for i in range(begin, end, 3)], numbers[end:]
