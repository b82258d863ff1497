"""The cost model with `compute.micro_batches`: which placements fit, and what a step takes.

Not covered: training in micro-batches (`tests/training/test_micro_batches.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from switokd.distillation.topology import Role, Topology
from switokd.errors import UsageError
from switokd.planning.cost_model import predict, rank_placements
from switokd.planning.pauses import Pauses
from switokd.planning.profile import Communication, NetworkTimes, Profile
from switokd.runtime.placement import Placement

BATCH = 64
LINK = Communication(
    description="free",
    latency_seconds=0,
    bandwidth_bytes_per_second=1e30,
    decision_seconds=0,
)


def times(role: Literal["teacher", "student"]) -> NetworkTimes:
    """A pass takes a second, and a second per 64 samples more; backward takes twice as long."""
    return NetworkTimes(
        role=role,
        model="any",
        samples=(8, BATCH),
        forward_seconds=(1 + 8 / BATCH, 2),
        backward_seconds=(2 + 16 / BATCH, 4),
        update_seconds=0,
        parameter_bytes=0,
        gradient_bytes=0,
        optimizer_bytes=0,
        activation_bytes_per_sample=0,
    )


PROFILE = Profile(
    device="cpu",
    threads=1,
    torch="any",
    image=(1, 8, 8),
    classes=10,
    networks={"t": times("teacher"), "s": times("student")},
    communication=LINK,
)
TOPOLOGY = Topology((("t", Role.TEACHER), ("s", Role.STUDENT)))


def test_only_placements_that_share_the_micro_batches_evenly_are_candidates() -> None:
    ranked = rank_placements(PROFILE, TOPOLOGY, BATCH, 3, Pauses.none(), micro_batches=4)
    assert ranked
    for prediction in ranked:
        for _, row in prediction.placement.table:
            assert len(row) in (1, 2, 4)
            assert len({weight for _, weight in row}) == 1
    without = rank_placements(PROFILE, TOPOLOGY, BATCH, 3, Pauses.none())
    assert any(len(row) == 3 for p in without for _, row in p.placement.table)


def test_ranks_that_cannot_share_the_micro_batches_are_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot share 2 evenly; use 1 or 2 ranks"):
        rank_placements(PROFILE, TOPOLOGY, BATCH, 8, Pauses.none(), micro_batches=2)


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "seconds"),
    # Both networks are on all ranks. A rank's passes of one network take 3 seconds each, and 3
    # seconds more for all 64 samples.
    [(1, 1, 2 * (3 + 3)), (1, 4, 2 * (4 * 3 + 3)), (2, 4, 2 * (2 * 3 + 1.5)), (4, 4, 2 * 3.75)],
)
def test_each_micro_batch_is_a_pass_of_its_own(
    ranks: int, micro_batches: int, seconds: float
) -> None:
    table = {name: list(range(ranks)) for name in ("t", "s")}
    placement = replace(Placement.of(table), micro_batches=micro_batches)
    step = predict(PROFILE, placement, BATCH, Pauses.none()).step_seconds
    assert step == pytest.approx(seconds)
