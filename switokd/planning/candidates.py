"""Candidate placements for a number of ranks: a limited list that the cost model then compares.

    grouped   The networks are divided into groups. Each group has its own ranks, and every network
              of the group is on all of them. Groups of one network are `dedicated`. A single
              group is `replicated`.
    filled    The smaller networks are on one rank each. The largest networks are on all ranks, and
              ranks with less other work get more of their samples.

Heuristics limit the number of candidates:

* Up to `MAX_NETWORKS_ENUMERATED` networks, all partitions into groups are tried. Above it, there is
  one partition per number of groups. Each network, largest first, joins the group with least work.
* If there are too many ways to distribute the ranks over the groups, ranks are assigned one by one
  to the group with most work per rank. Candidates are this distribution and those that differ from
  it by moving one rank.

Torch-free.

Not covered: groups that share some ranks (except filled); devices of unequal speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heapreplace
from itertools import accumulate, combinations, islice, pairwise, permutations
from math import comb

from switokd.distillation.topology import Topology
from switokd.runtime.placement import Placement

MAX_NETWORKS_ENUMERATED = 6

Groups = list[list[str]]
Work = Mapping[str, float]
"""By network: seconds of a step with the whole batch on one device."""


def candidates(
    topology: Topology, works: Sequence[Work], batch_size: int, devices: int, limit: int
) -> list[Placement]:
    """Return at most `limit` different placements on exactly `devices` ranks.

    works: work expected with pauses, and work without pauses. The heuristics use the first one.
    """
    names = list(topology)
    placements = dict.fromkeys(
        placement
        for work in works
        for spread in range(1, len(names))
        if (placement := _filled(names, work, spread, batch_size, devices))
    )
    placements.update(dict.fromkeys(islice(_grouped(names, works[0], devices, limit), limit)))
    return list(placements)[:limit]


def _grouped(names: list[str], work: Work, devices: int, limit: int) -> Iterator[Placement]:
    """Yield the grouped placements, fewest groups first."""
    if len(names) <= MAX_NETWORKS_ENUMERATED:
        partitions = [p for p in _partitions(names) if len(p) <= devices]
    else:
        partitions = [_balanced(names, work, n) for n in range(1, min(len(names), devices) + 1)]
    partitions.sort(key=len)
    for groups in partitions:  # ranks then follow the order of the topology
        groups.sort(key=lambda group: names.index(group[0]))
    if sum(comb(devices - 1, len(p) - 1) for p in partitions) <= limit:
        for groups in partitions:
            for ends in combinations(range(1, devices), len(groups) - 1):
                counts = [b - a for a, b in pairwise([0, *ends, devices])]
                yield _placement(names, groups, counts)
        return
    balanced = [_ranks_per_group(groups, work, devices) for groups in partitions]
    for groups, counts in zip(partitions, balanced, strict=True):
        yield _placement(names, groups, counts)
    for groups, counts in zip(partitions, balanced, strict=True):
        for source, target in permutations(range(len(groups)), 2):
            if counts[source] > 1:
                moved = list(counts)
                moved[source] -= 1
                moved[target] += 1
                yield _placement(names, groups, moved)


def _partitions(names: Sequence[str]) -> Iterator[Groups]:
    """Yield all partitions of `names` into groups."""
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    for groups in _partitions(rest):
        yield [[first], *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], [first, *group], *groups[i + 1 :]]


def _balanced(names: list[str], work: Work, n: int) -> Groups:
    """Make `n` groups of similar work: each network, largest first, joins the lightest group."""
    groups: Groups = [[] for _ in range(n)]
    loads = [0.0] * n
    for name in sorted(names, key=lambda name: -work[name]):
        lightest = min(range(n), key=lambda i: (loads[i], len(groups[i])))
        groups[lightest].append(name)
        loads[lightest] += work[name]
    return [sorted(group, key=names.index) for group in groups]


def _ranks_per_group(groups: Groups, work: Work, devices: int) -> list[int]:
    """Distribute the ranks: one per group, the others to the group with most work per rank."""
    loads = [sum(work[name] for name in group) for group in groups]
    counts = [1] * len(groups)
    for _ in range(devices - len(groups)):
        counts[max(range(len(groups)), key=lambda i: loads[i] / counts[i])] += 1
    return counts


def _placement(names: list[str], groups: Groups, counts: Sequence[int]) -> Placement:
    """Give each group consecutive ranks. counts: number of ranks per group."""
    spans = pairwise(accumulate(counts, initial=0))
    ranks = {
        name: range(a, b) for group, (a, b) in zip(groups, spans, strict=True) for name in group
    }
    return Placement.of({name: ranks[name] for name in names})


def _filled(
    names: list[str], work: Work, spread: int, batch_size: int, devices: int
) -> Placement | None:
    """Make a filled placement with the `spread` largest networks on all ranks.

    None if a rank would have nothing to do.
    """
    by_work = sorted(names, key=lambda name: -work[name])
    loads = [0.0] * devices
    table: dict[str, dict[int, float]] = {}
    for name in by_work[spread:]:
        lightest = loads.index(min(loads))
        table[name] = {lightest: 1.0}
        loads[lightest] += work[name]
    samples = distribute_samples(loads, sum(work[name] for name in by_work[:spread]), batch_size)
    table |= {
        name: {rank: float(n) for rank, n in enumerate(samples) if n} for name in by_work[:spread]
    }
    # Devices are alike: sorted ranks make placements equal that differ by the order of ranks only.
    places = [tuple(table[name].get(rank, 0.0) for name in names) for rank in range(devices)]
    places.sort(reverse=True)
    if not any(places[-1]):
        return None
    columns = zip(names, zip(*places, strict=True), strict=True)
    rows = {name: {rank: n for rank, n in enumerate(column) if n} for name, column in columns}
    return Placement.of(
        {name: row if len(set(row.values())) > 1 else list(row) for name, row in rows.items()}
    )


def distribute_samples(loads: Sequence[float], work: float, batch_size: int) -> list[int]:
    """Assign each sample to the rank with least work; return the number of samples per rank.

    loads: other work per rank, in seconds. work: seconds of all samples together, shared equally.
    The result minimises the largest work of a rank, with one exception: no rank is left with
    a single sample, which moves to the rank with most samples.
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
