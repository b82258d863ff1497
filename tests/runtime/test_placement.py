"""The placement table: networks, ranks and shards."""

from __future__ import annotations

import pytest

from switokd.distillation.topology import Role, Topology
from switokd.runtime.placement import (
    LocalPlacement,
    Placement,
    dedicated,
    replicated,
)

TOPOLOGY = Topology((("big", Role.TEACHER), ("small", Role.TEACHER), ("s", Role.STUDENT)))


def sizes(placement: Placement, network: str, n: int) -> list[int]:
    return [s.stop - s.start for s in placement.shards(network, n).values()]


def test_dedicated_gives_each_network_its_own_ranks() -> None:
    placement = dedicated(TOPOLOGY, {"big": 6, "small": 1, "s": 1})
    assert placement.world_size == 8
    assert placement.ranks_of("big") == (0, 1, 2, 3, 4, 5)
    assert (placement.ranks_of("small"), placement.ranks_of("s")) == ((6,), (7,))
    assert placement.networks_of(6) == ("small",)
    assert str(placement) == "big: ranks 0-5, small: rank 6, s: rank 7"
    assert (placement.who(6), placement.whose("big")) == ("rank 6 (small)", "big (ranks 0-5)")


def test_replicated_gives_every_rank_everything() -> None:
    placement = replicated(TOPOLOGY, 2)
    assert placement.networks_of(1) == ("big", "small", "s")
    assert placement.shards("s", 5) == {0: slice(0, 2), 1: slice(2, 5)}
    assert placement.part(1, 5) == slice(2, 5)
    assert replicated(TOPOLOGY, 1).part(0, 5) == slice(0, 5)


def test_any_table_with_weights() -> None:
    placement = Placement.of({"big": [0, 1, 3], "small": {2: 1, 1: 3}, "s": [2]})
    assert placement.world_size == 4
    assert placement.networks_of(1) == ("big", "small")
    assert placement.shards("small", 64) == {1: slice(0, 48), 2: slice(48, 64)}
    assert placement.part(1, 64) == slice(0, 48)
    assert str(placement) == "big: ranks 0-1, 3, small: ranks 1-2 (3:1), s: rank 2"
    place = LocalPlacement(placement, 1)
    assert place.networks == ("big", "small")
    assert place.shard("big", 64) == place.local("big", 64) == slice(21, 43)
    assert place.local("small", 64) == slice(0, 48)
    # Rank 2 loads everything for s, so its part of small does not begin at its own start.
    assert LocalPlacement(placement, 2).local("small", 64) == slice(48, 64)
    assert LocalPlacement(placement, 3).local("big", 64) == slice(0, 21)


@pytest.mark.parametrize("n", range(1, 40))
@pytest.mark.parametrize("weights", [[1], [1, 1], [1, 1, 1, 1, 1, 1], [1, 3], [5, 0.1, 2]])
def test_shards_cover_the_batch_and_leave_no_sample_alone(n: int, weights: list[float]) -> None:
    placement = Placement.of({"s": dict(enumerate(weights))})
    shards = list(placement.shards("s", n).values())
    assert [i for s in shards for i in range(n)[s]] == list(range(n))
    assert len(shards) == len(weights)
    if n > 1:  # BatchNorm has no variance over one sample
        assert 1 not in sizes(placement, "s", n)


def test_large_shards_are_in_proportion() -> None:
    placement = Placement.of({"s": {0: 5, 1: 2, 2: 1}})
    assert sizes(placement, "s", 80) == [50, 20, 10]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"s": [0], "t": [2]}, "ranks must be 0 to world size - 1, each used; got [0, 2]"),
        ({"s": [0], "t": []}, "t needs at least one rank"),
        ({"s": {0: 1.0, 1: 0.0}}, "weights above 0"),
    ],
)
def test_impossible_tables(table: dict[str, list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=r"rank|weights") as caught:
        Placement.of(table)
    assert words in str(caught.value)
