"""Placements worth predicting: tables for so many ranks, in a bounded number.

    grouped   the networks are parted into groups; each group has ranks of its own, and each of
              the group's networks is on all of them. Groups of one are `dedicated`, a single
              group is `replicated`.
    filled    the largest networks are on all ranks, each sample where there is least to do beside
              the others, which are whole on one rank each

Heuristics bound what there is too much of:

* up to `MANY_NETWORKS` networks all ways to part them are tried; beyond it, for each number of
  groups, the one that is made by adding each network, largest first, to the lightest group;
* where all ways to deal out the ranks to the groups would be more than the limit, ranks go one by
  one to the group with most work per rank; that, and all that differ from it by one rank moved.

Torch-free.

Not covered: groups that share some of their ranks (but for filled); devices of unequal speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heapreplace
from itertools import accumulate, combinations, islice, pairwise, permutations
from math import comb

from switokd.distillation.topology import Topology
from switokd.runtime.placement import Placement

MANY_NETWORKS = 6

Groups = list[list[str]]
Work = Mapping[str, float]
"""By network: seconds of one step with the whole batch on one device."""


def candidates(
    topology: Topology, works: Sequence[Work], batch_size: int, devices: int, limit: int
) -> list[Placement]:
    """Different placements on exactly `devices` ranks, `limit` at most.

    works: [expected over pauses, without pauses]; the first decides the heuristics.
    """
    names = list(topology)
    found = dict.fromkeys(
        placement
        for work in works
        for spread in range(1, len(names))
        if (placement := _filled(names, work, spread, batch_size, devices))
    )
    found.update(dict.fromkeys(islice(_grouped(names, works[0], devices, limit), limit)))
    return list(found)[:limit]


def _grouped(names: list[str], work: Work, devices: int, limit: int) -> Iterator[Placement]:
    if len(names) <= MANY_NETWORKS:
        parts = [p for p in _partitions(names) if len(p) <= devices]
    else:
        parts = [_balanced(names, work, n) for n in range(1, min(len(names), devices) + 1)]
    parts.sort(key=len)
    for groups in parts:  # in the topology's order, so that ranks are
        groups.sort(key=lambda group: names.index(group[0]))
    if sum(comb(devices - 1, len(p) - 1) for p in parts) <= limit:
        for groups in parts:
            for ends in combinations(range(1, devices), len(groups) - 1):
                yield _deal(names, groups, [b - a for a, b in pairwise([0, *ends, devices])])
        return
    shared = [_shared_out(groups, work, devices) for groups in parts]
    for groups, ranks in zip(parts, shared, strict=True):
        yield _deal(names, groups, ranks)
    for groups, ranks in zip(parts, shared, strict=True):
        for giver, taker in permutations(range(len(groups)), 2):
            if ranks[giver] > 1:
                moved = list(ranks)
                moved[giver] -= 1
                moved[taker] += 1
                yield _deal(names, groups, moved)


def _partitions(names: Sequence[str]) -> Iterator[Groups]:
    """All ways to part `names` into groups."""
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    for groups in _partitions(rest):
        yield [[first], *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], [first, *group], *groups[i + 1 :]]


def _balanced(names: list[str], work: Work, n: int) -> Groups:
    """`n` groups of about equal work: each network, largest first, to the lightest group."""
    groups: Groups = [[] for _ in range(n)]
    loads = [0.0] * n
    for name in sorted(names, key=lambda name: -work[name]):
        lightest = min(range(n), key=lambda i: (loads[i], len(groups[i])))
        groups[lightest].append(name)
        loads[lightest] += work[name]
    return [sorted(group, key=names.index) for group in groups]


def _shared_out(groups: Groups, work: Work, devices: int) -> list[int]:
    """Ranks for each group: one each, the others to whoever has most work per rank."""
    loads = [sum(work[name] for name in group) for group in groups]
    ranks = [1] * len(groups)
    for _ in range(devices - len(groups)):
        ranks[max(range(len(groups)), key=lambda i: loads[i] / ranks[i])] += 1
    return ranks


def _deal(names: list[str], groups: Groups, ranks: Sequence[int]) -> Placement:
    """Neighbouring ranks for each group, so many."""
    spans = pairwise(accumulate(ranks, initial=0))
    where = {
        name: range(a, b) for group, (a, b) in zip(groups, spans, strict=True) for name in group
    }
    return Placement.of({name: where[name] for name in names})


def _filled(
    names: list[str], work: Work, spread: int, batch_size: int, devices: int
) -> Placement | None:
    """Spread the `spread` largest networks over what the others leave; None if a rank is idle."""
    by_work = sorted(names, key=lambda name: -work[name])
    loads = [0.0] * devices
    table: dict[str, dict[int, float]] = {}
    for name in by_work[spread:]:
        lightest = loads.index(min(loads))
        table[name] = {lightest: 1.0}
        loads[lightest] += work[name]
    samples = _whole_samples(loads, sum(work[name] for name in by_work[:spread]), batch_size)
    table |= {
        name: {rank: float(n) for rank, n in enumerate(samples) if n} for name in by_work[:spread]
    }
    # Devices are alike: in one order of the ranks, equal placements are found equal.
    places = [tuple(table[name].get(rank, 0.0) for name in names) for rank in range(devices)]
    places.sort(reverse=True)
    if not any(places[-1]):
        return None
    columns = zip(names, zip(*places, strict=True), strict=True)
    rows = {name: {rank: n for rank, n in enumerate(column) if n} for name, column in columns}
    return Placement.of(
        {name: row if len(set(row.values())) > 1 else list(row) for name, row in rows.items()}
    )


def _whole_samples(loads: Sequence[float], work: float, batch_size: int) -> list[int]:
    """Deal out samples, each to the rank with least to do.

    loads: what ranks have to do beside them. work: all samples'. If each sample takes as long, no
    other way has less to do for the rank with most. But a single sample goes where most are.
    """
    samples = [0] * len(loads)
    queue = [(load, rank) for rank, load in enumerate(loads)]
    heapify(queue)
    for _ in range(batch_size):
        load, rank = queue[0]
        samples[rank] += 1
        heapreplace(queue, (load + work / batch_size, rank))
    samples = [n if n > 1 else 0 for n in samples]
    samples[samples.index(max(samples))] += batch_size - sum(samples)
    return samples
