"""Predictions against values computed by hand, and properties that hold for every placement.

Not covered: measuring (`test_profile_networks.py`), the command (`test_plan_command.py`).
"""

from __future__ import annotations

import random

import pytest

from switokd.distillation.couplings import Couplings
from switokd.distillation.method import Method
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Role, Topology
from switokd.errors import UsageError
from switokd.planning.candidates import candidates
from switokd.planning.cost_model import (
    Prediction,
    choose,
    predict,
    rank_placements,
    shard_sizes,
    simplest_of_the_best,
)
from switokd.planning.pauses import Pauses
from switokd.planning.profile import Communication, NetworkTimes, Profile
from switokd.runtime.placement import Placement, dedicated, replicated

BATCH = 60
FREE = Communication(
    description="free",
    latency_seconds=0,
    bandwidth_bytes_per_second=1e30,
    decision_seconds=0,
)


def times(
    role: Role, whole: float, update: float = 0.0, overhead: float = 0.0, size: int = 0
) -> NetworkTimes:
    """Give times linear in samples: `whole` seconds for BATCH samples, a third of it forward."""
    sizes = (BATCH // 6, BATCH)
    return NetworkTimes(
        role=role.value,
        model="mine:any",
        samples=sizes,
        forward_seconds=tuple(overhead + whole / 3 * n / BATCH for n in sizes),
        backward_seconds=tuple(overhead + whole * 2 / 3 * n / BATCH for n in sizes),
        update_seconds=update,
        parameter_bytes=size,
        gradient_bytes=size,
        optimizer_bytes=2 * size,
        activation_bytes_per_sample=10,
    )


def a_profile(link: Communication = FREE, **networks: NetworkTimes) -> Profile:
    return Profile(
        device="cpu",
        threads=1,
        torch="0",
        image=(1, 8, 8),
        classes=10,
        networks=networks,
        communication=link,
    )


def topology_of(profile: Profile) -> Topology:
    return Topology(tuple((name, Role(n.role)) for name, n in profile.networks.items()))


def ten_one_one(link: Communication = FREE, update: float = 0.0) -> Profile:
    return a_profile(
        link,
        large=times(Role.TEACHER, 10, update),
        small=times(Role.TEACHER, 1, update),
        student=times(Role.STUDENT, 1, update),
    )


def step(profile: Profile, placement: Placement, pauses: Pauses | None = None) -> float:
    return predict(profile, placement, BATCH, pauses or Pauses.none()).step_seconds


def test_dedicated_is_bounded_by_the_slowest_network() -> None:
    profile = ten_one_one()
    found = predict(
        profile,
        dedicated(topology_of(profile), {"large": 1, "small": 1, "student": 1}),
        BATCH,
        Pauses.none(),
    )
    assert found.step_seconds == pytest.approx(10)
    assert found.images_per_second == pytest.approx(6)
    assert found.efficiency == pytest.approx(12 / 30)


def test_replicated_is_ideal_without_costs_of_shards_and_communication() -> None:
    profile = ten_one_one()
    found = predict(profile, replicated(topology_of(profile), 3), BATCH, Pauses.none())
    assert found.step_seconds == pytest.approx(4)
    assert found.efficiency == pytest.approx(1)


def test_six_ranks_for_the_large_network_and_one_for_each_small_one() -> None:
    profile = ten_one_one()
    table = dedicated(topology_of(profile), {"large": 6, "small": 1, "student": 1})
    assert step(profile, table) == pytest.approx(10 / 6)


def test_every_rank_updates_the_whole_network() -> None:
    profile = ten_one_one(update=0.5)
    assert step(profile, replicated(topology_of(profile), 3)) == pytest.approx(4 + 3 * 0.5)


def test_steps_that_share_an_update_share_its_cost() -> None:
    slow = Communication(
        description="slow",
        latency_seconds=0.3,
        bandwidth_bytes_per_second=1e30,
        decision_seconds=0,
    )
    profile = ten_one_one(slow, update=0.5)
    table = replicated(topology_of(profile), 3)
    free = ten_one_one()  # without all-reduce and update
    exchange = 0.3
    every, fourth = step(profile, table), step(profile.model_copy(update={"accumulate": 4}), table)
    assert fourth - exchange == pytest.approx(step(free, table) + (every - exchange - 4) / 4)


def test_paused_teachers_cost_only_their_forward_pass() -> None:
    profile = ten_one_one()
    table = Placement.of({"large": [0], "small": [1], "student": [1]})
    always = Pauses.independent({"large": 1.0})
    assert step(profile, table, always) == pytest.approx(10 / 3)
    half = Pauses.independent({"large": 0.5})
    assert step(profile, table, half) == pytest.approx((10 + 10 / 3) / 2)


def test_maximum_over_ranks_is_taken_per_pattern_of_pauses() -> None:
    """Two teachers that are paused half the time differ from teachers of half the cost."""
    profile = a_profile(
        a=times(Role.TEACHER, 3), b=times(Role.TEACHER, 3), s=times(Role.STUDENT, 0)
    )
    table = Placement.of({"a": [0], "b": [1], "s": [0]})
    independent = Pauses.independent({"a": 0.5, "b": 0.5})  # both paused in 1/4 of the steps
    assert step(profile, table, independent) == pytest.approx(0.75 * 3 + 0.25 * 1)
    together = Pauses(((frozenset({"a", "b"}), 0.5), (frozenset(), 0.5)))
    assert step(profile, table, together) == pytest.approx(0.5 * 3 + 0.5 * 1)


def test_all_reduce_waits_for_the_slowest_rank_and_overlaps_the_next_backward() -> None:
    link = Communication(
        description="", latency_seconds=1, bandwidth_bytes_per_second=10, decision_seconds=0
    )
    profile = a_profile(
        link, t=times(Role.TEACHER, 6, size=40), s=times(Role.STUDENT, 6, size=40)
    ).model_copy(update={"classes": 1})
    # Exchange: latency 1 + (60 + 60) / 2 samples x 3 values x 4 bytes / 10. Backward of 30
    # samples takes 2. The student's all-reduce starts at 2, takes 1 + 2 (1/2) 40 / 10 = 5 and ends
    # at 7. The teacher's backward ends at 4, its all-reduce starts at 7 and ends at 12. Then there
    # are two forward passes of 1.
    both = replicated(topology_of(profile), 2)
    assert step(profile, both) == pytest.approx((1 + 60 * 12 / 10) + 12 + 2)


def test_buckets_of_large_gradients_overlap_backward() -> None:
    size = 4 * FREE.bucket_bytes
    slow, fast = (
        Communication(
            description="",
            latency_seconds=0.1,
            bandwidth_bytes_per_second=FREE.bucket_bytes / seconds,
            decision_seconds=0,
        )
        for seconds in (1.0, 0.2)
    )
    for link, graphs, end in (
        # Backward of 30 samples takes 4. From 1 on, the first bucket: 4 (0.1 + 2 (1/2) 1).
        (slow, False, 1 + 4 * 1.1),
        # The all-reduce is faster than backward: only the last bucket comes after backward.
        (fast, False, 4 + 0.1 + 0.2),
        # A CUDA graph has all gradients at its end only.
        (slow, True, 4 + 4 * 1.1),
        (fast, True, 4 + 4 * 0.3),
    ):
        teacher = times(Role.TEACHER, 12, size=size).model_copy(update={"cuda_graphs": graphs})
        profile = a_profile(link, t=teacher, s=times(Role.STUDENT, 0))
        both = Placement.of({"t": [0, 1], "s": [0]})
        exchange = predict(profile, both, BATCH, Pauses.independent({"t": 1.0})).step_seconds - 2
        assert step(profile, both) - exchange == pytest.approx(end + 2)


def test_uneven_shards_wait_for_each_other() -> None:
    profile = a_profile(t=times(Role.TEACHER, 6), s=times(Role.STUDENT, 6))
    table = Placement.of({"t": {0: 1, 1: 2}, "s": [0]})
    # Rank 0: student 4, teacher 4/3, for which rank 1 waits; then forward passes of 2/3 and 2.
    assert step(profile, table) == pytest.approx(4 + 4 / 3 + 2 / 3 + 2)


def test_only_updates_of_teachers_wait_for_the_decision() -> None:
    link = FREE.model_copy(update={"decision_seconds": 100.0})
    profile = ten_one_one(link)
    table = Placement.of({"large": [0], "small": [0], "student": [1]})
    assert step(profile, table) == pytest.approx(100 + 11 / 3)
    assert step(profile, table, Pauses.independent({"large": 1.0, "small": 1.0})) < 100


def test_memory_is_the_sum_over_the_networks_of_a_rank() -> None:
    profile = a_profile(t=times(Role.TEACHER, 1, size=1000), s=times(Role.STUDENT, 1, size=100))
    found = predict(
        profile, Placement.of({"t": [0, 1], "s": [1]}), BATCH, Pauses.none()
    ).memory_bytes
    assert found == (4000 + 30 * 10, 4000 + 30 * 10 + 400 + 60 * 10)


@pytest.mark.parametrize(
    ("batch_size", "devices", "sizes"),
    [
        (64, 1, (64,)),
        (64, 2, (32, 64)),
        (64, 3, (21, 32, 64)),
        (64, 8, (8, 16, 32, 64)),
        (8, 100, (2, 4, 8)),
        (2, 4, (2,)),
    ],
)
def test_shard_sizes(batch_size: int, devices: int, sizes: tuple[int, ...]) -> None:
    assert shard_sizes(batch_size, devices) == sizes


def some_profile(seed: int) -> Profile:
    draw = random.Random(seed)
    link = Communication(
        description="",
        latency_seconds=draw.uniform(0, 0.1),
        bandwidth_bytes_per_second=draw.uniform(1e3, 1e5),
        decision_seconds=draw.uniform(0, 1),
    )
    roles = [Role.TEACHER, Role.TEACHER, Role.STUDENT]
    return a_profile(
        link,
        **{
            f"n{i}": times(
                role, draw.uniform(0.1, 5), draw.uniform(0, 1), draw.uniform(0, 0.2), 1000
            )
            for i, role in enumerate(roles)
        },
    )


def slower(profile: Profile, factor: float) -> Profile:
    def stretched(n: NetworkTimes) -> NetworkTimes:
        return n.model_copy(
            update={
                "forward_seconds": tuple(factor * t for t in n.forward_seconds),
                "backward_seconds": tuple(factor * t for t in n.backward_seconds),
                "update_seconds": factor * n.update_seconds,
            }
        )

    link = profile.communication
    return profile.model_copy(
        update={
            "networks": {name: stretched(n) for name, n in profile.networks.items()},
            "communication": link.model_copy(
                update={
                    "latency_seconds": factor * link.latency_seconds,
                    "bandwidth_bytes_per_second": link.bandwidth_bytes_per_second / factor,
                    "decision_seconds": factor * link.decision_seconds,
                }
            ),
        }
    )


@pytest.mark.parametrize("seed", range(5))
def test_properties_of_every_placement(seed: int) -> None:
    profile = some_profile(seed)
    pauses = Pauses.independent({"n0": 0.4, "n1": 0.2})
    faster_link = profile.model_copy(
        update={
            "communication": profile.communication.model_copy(
                update={"bandwidth_bytes_per_second": 1e6}
            )
        }
    )
    found = rank_placements(profile, topology_of(profile), BATCH, 4, pauses)
    assert [p.step_seconds for p in found] == pytest.approx(
        sorted(p.step_seconds for p in found), rel=1e-5
    )
    for p in found:
        assert p == predict(profile, p.placement, BATCH, pauses)
        assert p.placement.world_size == 4
        assert 0 < p.efficiency <= 1
        assert step(faster_link, p.placement, pauses) <= p.step_seconds
        assert step(slower(profile, 3.0), p.placement, pauses) == pytest.approx(3 * p.step_seconds)
        assert p.step_seconds <= step(profile, p.placement)  # a pause never makes a step slower


def test_best_is_at_least_as_good_as_every_table_of_whole_networks_and_even_shards() -> None:
    profile = ten_one_one()
    topology = topology_of(profile)
    best = rank_placements(profile, topology, BATCH, 8, Pauses.none())[0]
    assert best.efficiency == pytest.approx(1, abs=0.1)
    for other in (
        replicated(topology, 8),
        dedicated(topology, {"large": 6, "small": 1, "student": 1}),
    ):
        assert best.step_seconds <= step(profile, other) + 1e-9


def test_networks_are_not_split_if_a_shard_costs_as_much_as_the_batch() -> None:
    profile = a_profile(
        a=times(Role.TEACHER, 0, overhead=1.0),
        b=times(Role.TEACHER, 0, overhead=1.0),
        s=times(Role.STUDENT, 0, overhead=1.0),
    )
    topology = topology_of(profile)
    best = choose(profile, topology, BATCH, 3, Pauses.none())
    assert best.placement == dedicated(topology, {"a": 1, "b": 1, "s": 1})
    two = choose(profile, topology, BATCH, 2, Pauses.none())
    assert all(len(two.placement.ranks_of(name)) == 1 for name in topology)


def test_simpler_placement_is_preferred_among_similar_ones() -> None:
    profile = a_profile(a=times(Role.TEACHER, 1), s=times(Role.STUDENT, 1))
    topology = topology_of(profile)
    ranked = rank_placements(profile, topology, BATCH, 2, Pauses.none())
    assert ranked[0].placement == dedicated(topology, {"a": 1, "s": 1})

    def prediction(seconds: float, placement: Placement) -> Prediction:
        return Prediction(placement, seconds, 1, 1, (1, 1), True)

    everywhere = replicated(topology, 2)
    near = [prediction(1.0, everywhere), prediction(1.01, ranked[0].placement)]
    assert simplest_of_the_best(near) == near[1]
    far = [prediction(1.0, everywhere), prediction(1.1, ranked[0].placement)]
    assert simplest_of_the_best(far) == far[0]


def test_placements_that_do_not_fit_into_memory_come_last() -> None:
    profile = a_profile(
        t=times(Role.TEACHER, 10, size=1000), s=times(Role.STUDENT, 0.1, size=1)
    ).model_copy(update={"device_memory_bytes": 4602})
    found = rank_placements(profile, topology_of(profile), BATCH, 2, Pauses.none())
    assert found[0].placement == dedicated(topology_of(profile), {"t": 1, "s": 1})
    assert [p.fits for p in found] == sorted((p.fits for p in found), reverse=True)
    assert not found[-1].fits
    assert found[0].step_seconds > found[-1].step_seconds


@pytest.mark.parametrize(("networks", "devices"), [(2, 1), (3, 64), (5, 16), (9, 4), (12, 32)])
def test_candidates_are_limited_distinct_and_use_every_rank(networks: int, devices: int) -> None:
    names = [f"n{i}" for i in range(networks)]
    topology = Topology(tuple((n, Role.STUDENT if n == "n0" else Role.TEACHER) for n in names))
    work = {n: 1.0 + i for i, n in enumerate(names)}
    found = candidates(topology, [work, work], 512, devices, limit=1000)
    assert 0 < len(found) <= 1000
    assert len(set(found)) == len(found)
    assert {p.world_size for p in found} == {devices}
    assert all([name for name, _ in p.table] == names for p in found)
    assert replicated(topology, devices) in found


def test_all_even_groupings_of_three_networks_on_four_ranks_are_tried() -> None:
    topology = topology_of(ten_one_one())
    work = {"large": 10.0, "small": 1.0, "student": 1.0}
    found = set(candidates(topology, [work], BATCH, 4, limit=1000))
    for k in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert dedicated(topology, dict(zip(work, k, strict=True))) in found
    assert Placement.of({"large": [0, 1, 2], "small": [3], "student": [3]}) in found
    assert Placement.of({"large": [0], "small": [1, 2, 3], "student": [0]}) in found
    # Filled: the small networks are on one rank each, the large network is on all ranks.
    assert (
        Placement.of({"large": {0: 18, 1: 18, 2: 12, 3: 12}, "small": [2], "student": [3]}) in found
    )


def test_many_teachers_and_devices_are_planned_within_seconds() -> None:
    networks = {f"t{i}": times(Role.TEACHER, 1 + i) for i in range(7)}
    profile = a_profile(FREE, **networks, s=times(Role.STUDENT, 1))
    topology = topology_of(profile)
    method = Method(Couplings(topology), make_strategy("switokd"))
    found = rank_placements(profile, topology, 512, 32, Pauses.default(method))
    assert found[0].efficiency > 0.7


def test_no_rank_gets_fewer_than_two_samples() -> None:
    profile = some_profile(1)
    topology = topology_of(profile)
    for devices, batch_size in ((3, 2), (8, 6), (8, 9)):
        found = rank_placements(profile, topology, batch_size, devices, Pauses.none())
        shards = [p.placement.shards(n, batch_size).values() for p in found for n in topology]
        assert all(s.stop - s.start >= 2 for each in shards for s in each)
    with pytest.raises(UsageError, match=r"a batch of 2 images is too small for 4 devices"):
        choose(profile, topology, 2, 4, Pauses.none())
