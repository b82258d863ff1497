"""The placement table: which ranks hold a network, and which shard of a batch each rank computes.

    dedicated    every network has ranks of its own, one or several
    replicated   every rank holds every network, and computes a shard of the batch
    (any other)  a rank may hold several networks; a network may have several ranks, with equal or
                 unequal shards

The ranks of one network add up their gradients (`training/reducer.py`). A batch may be computed in
micro-batches whose number does not depend on the ranks (`training/micro_batches.py`).

Not covered: choosing the table (`planning/cost_model.py`); splitting a network by layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise

from switokd.distillation.topology import Topology

MOST = 1e6
"""Largest weight of a rank; an infinite weight has no shard."""

Shares = Mapping[int, float]
"""By rank: its weight. The ranks of a network share a batch in proportion to their weights."""


@dataclass(frozen=True)
class Placement:
    """The table: networks in the topology's order, with their ranks (ascending) and weights."""

    table: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
    micro_batches: int = 1
    """A power of two: parts in which every network's batch is computed, on all its ranks together.
    1: each rank computes its shard at once."""

    @classmethod
    def of(cls, table: Mapping[str, Sequence[int] | Shares]) -> Placement:
        """Build a placement from {network: ranks} or {network: {rank: weight}}.

        ValueError unless the ranks are 0 to world size - 1 and the weights are positive.
        """
        rows = {
            name: dict(row) if isinstance(row, Mapping) else dict.fromkeys(row, 1.0)
            for name, row in table.items()
        }
        for name, row in rows.items():
            if not row or not all(0 < weight <= MOST for weight in row.values()):
                raise ValueError(f"{name} needs at least one rank, and weights above 0 to {MOST:g}")
        used = {rank for row in rows.values() for rank in row}
        if used != set(range(len(used))):
            raise ValueError(f"ranks must be 0 to world size - 1, each used; got {sorted(used)}")
        return cls(tuple((name, tuple(sorted(row.items()))) for name, row in rows.items()))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return 1 + max(rank for _, row in self.table for rank, _ in row)

    def ranks_of(self, network: str) -> tuple[int, ...]:
        """Return the ranks that hold `network`, ascending. KeyError for an unknown network."""
        return self._ranks[network]

    def networks_of(self, rank: int) -> tuple[str, ...]:
        """Return the networks that `rank` holds, in the topology's order."""
        return self._networks.get(rank, ())

    def shards(self, network: str, n: int) -> dict[int, slice]:
        """Return the shards of `network` in a batch of `n` samples, by rank; some may be empty."""
        if self.micro_batches == 1:
            return _shards(dict(self.table)[network], n)
        parts = {rank: self.parts(network, rank, n) for rank in self.ranks_of(network)}
        return {rank: slice(own[0].start, own[-1].stop) for rank, own in parts.items()}

    def parts(self, network: str, rank: int, n: int) -> list[slice]:
        """Return the micro-batches of `network` that `rank` computes; some may be empty.

        Where they begin and end in the batch depends on `n` and their number alone.
        """
        if self.micro_batches == 1:
            return [self.shards(network, n)[rank]]
        ranks = self.ranks_of(network)
        each, index = self.micro_batches // len(ranks), ranks.index(rank)
        return _micro_batches(self.micro_batches, n)[index * each : (index + 1) * each]

    def problem_with(self, n: int, suffix: str = "") -> str:
        """Return an error message if a batch of `n` samples is too small, else an empty string.

        Every rank of a network with several ranks needs two samples. suffix: text after the number
        of images; empty if `n` is the batch size of the run file.
        """
        if self.micro_batches > 1:
            return self._problem_with_micro_batches(n, suffix)
        for name, row in self.table:
            shards = self.shards(name, n).values()
            if len(row) > 1 and min(shard.stop - shard.start for shard in shards) < 2:
                larger = "" if suffix else "a larger batch, or "
                return (
                    f"data.batch_size: {n} images{suffix} leave a rank of {self.whose(name)} fewer "
                    f"than 2; use {larger}fewer ranks for this network"
                )
        return ""

    def _problem_with_micro_batches(self, n: int, suffix: str) -> str:
        count = self.micro_batches
        for name, row in self.table:
            if len({weight for _, weight in row}) > 1 or count % len(row):
                fitting = [str(2**i) for i in range(count.bit_length())]
                return (
                    f"compute.micro_batches: {self.whose(name)} cannot share {count} evenly; use "
                    f"{', '.join(fitting[:-1])} or {fitting[-1]} ranks of equal weight"
                )
        sizes = [part.stop - part.start for part in _micro_batches(count, n)]
        if min(sizes) < 2:
            return (
                f"compute.micro_batches: {n} images{suffix} leave one of {count} micro-batches "
                "fewer than 2; use fewer micro-batches" + ("" if suffix else " or a larger batch")
            )
        return ""

    def part(self, rank: int, n: int) -> slice:
        """Return the slice of a batch of `n` samples that contains all shards of `rank`."""
        shards = [self.shards(name, n)[rank] for name in self.networks_of(rank)]
        shards = [s for s in shards if s.stop > s.start] or [slice(0, 0)]
        return slice(min(s.start for s in shards), max(s.stop for s in shards))

    @cached_property
    def networks(self) -> tuple[str, ...]:
        """All networks, in the topology's order."""
        return tuple(name for name, _ in self.table)

    @cached_property
    def _ranks(self) -> Mapping[str, tuple[int, ...]]:
        """Ranks by network; cached, because every step reads them many times."""
        return {name: tuple(rank for rank, _ in row) for name, row in self.table}

    @cached_property
    def _networks(self) -> Mapping[int, tuple[str, ...]]:
        """Networks by rank."""
        return {
            rank: tuple(name for name, ranks in self._ranks.items() if rank in ranks)
            for rank in range(self.world_size)
        }

    def whose(self, network: str) -> str:
        """Describe a network with its ranks: "teacher2 (rank 1)"."""
        return f"{network} ({_describe_ranks(dict(self.table)[network])})"

    def who(self, rank: int) -> str:
        """Describe a rank with its networks: "rank 1 (teacher2)"."""
        return f"rank {rank} ({', '.join(self.networks_of(rank))})"

    def __str__(self) -> str:
        """Return text such as "teacher1: ranks 0-1 (34:30), teacher2: rank 2".

        Equal weights are omitted.
        """
        return ", ".join(
            f"{name}: {_describe_ranks(row)}{_describe_shares(row)}" for name, row in self.table
        )


@dataclass(frozen=True)
class LocalPlacement:
    """One rank's view of the placement table."""

    placement: Placement
    rank: int

    @cached_property
    def networks(self) -> tuple[str, ...]:
        """Networks that this rank holds."""
        return self.placement.networks_of(self.rank)

    def shard(self, network: str, n: int) -> slice:
        """Return this rank's shard of a batch of `n` samples for one of its networks."""
        return self.placement.shards(network, n)[self.rank]

    def shards(self, network: str, n: int) -> list[slice]:
        """Return the shards of all ranks of `network`, in rank order."""
        return list(self.placement.shards(network, n).values())

    def parts(self, network: str, n: int) -> list[slice]:
        """Return the micro-batches that this rank computes for one of its networks."""
        return self.placement.parts(network, self.rank, n)

    def part(self, n: int) -> slice:
        """Return the slice of a batch of `n` samples that this rank must load."""
        return self.placement.part(self.rank, n)

    def local(self, network: str, n: int) -> slice:
        """Return this rank's shard for `network`, relative to the loaded slice (`part`)."""
        shard, start = self.shard(network, n), self.part(n).start
        is_empty = shard.stop == shard.start
        return slice(0, 0) if is_empty else slice(shard.start - start, shard.stop - start)


def dedicated(topology: Topology, ranks: Mapping[str, int]) -> Placement:
    """Place each network on `ranks[network]` ranks of its own, in the run file's order."""
    ends = list(accumulate((ranks[name] for name in topology), initial=0))
    return Placement.of(
        {name: range(a, b) for name, (a, b) in zip(topology, pairwise(ends), strict=True)}
    )


def replicated(topology: Topology, world_size: int) -> Placement:
    """Place every network on every rank."""
    return Placement.of({name: range(world_size) for name in topology})


@cache
def _shards(row: tuple[tuple[int, float], ...], n: int) -> dict[int, slice]:
    """Split `n` samples by the ranks' weights into contiguous shards, by rank.

    A shard of one sample would have no variance for BatchNorm; its sample goes to the largest
    shard.
    """
    total = sum(weight for _, weight in row)
    ends = [round(n * end / total) for end in accumulate(weight for _, weight in row)]
    sizes = [b - a for a, b in pairwise([0, *ends])]
    for i in reversed(range(len(sizes))):
        if sizes[i] == 1 and n > 1:
            sizes[i] = 0
            sizes[sizes.index(max(sizes))] += 1
    bounds = pairwise(accumulate(sizes, initial=0))
    return {rank: slice(a, b) for (rank, _), (a, b) in zip(row, bounds, strict=True)}


@cache
def _micro_batches(count: int, n: int) -> list[slice]:
    """Split `n` samples into `count` contiguous micro-batches, as equal in size as possible."""
    return list(_shards(tuple((i, 1.0) for i in range(count)), n).values())


def _describe_ranks(row: tuple[tuple[int, float], ...]) -> str:
    ranks = [rank for rank, _ in row]
    spans = [[ranks[0], ranks[0]]]
    for rank in ranks[1:]:
        if rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


def _describe_shares(row: tuple[tuple[int, float], ...]) -> str:
    weights = [weight for _, weight in row]
    return f" ({':'.join(f'{w:g}' for w in weights)})" if len(set(weights)) > 1 else ""
