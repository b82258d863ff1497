"""Combining the measurements of several ranks into the metrics of an epoch."""

from __future__ import annotations

from typing import Any

import pytest

from switokd.training.metrics import EpochMetrics


def row(network: str, **changes: Any) -> dict[str, Any]:
    """Return the row of one network on one rank, after 10 steps with 6 samples each."""
    return {
        "network": network,
        "role": "teacher",
        "lr": 0.1,
        "steps_paused": 4,
        "loss_sum": 18.0,
        "learned": 36,
        "correct": 30,
        "samples": 60,
        "tested": (3, 4),
        "tested_average": None,
        "training_seconds": 2.0,
    } | changes


def test_sums_of_ranks_are_added_before_they_are_divided() -> None:
    second = row("t", loss_sum=0.0, learned=12, correct=20, samples=20, tested=(0, 1))
    rows = [row("t"), row("s", training_seconds=3.0), second]
    metrics = EpochMetrics.of(4, 50, ["t", "s"], rows)
    teacher, student = metrics.networks
    assert (teacher.network, student.network) == ("t", "s")
    assert teacher.loss == pytest.approx(18 / 48)
    assert teacher.train_top1 == pytest.approx(100 * 50 / 80)
    assert (teacher.steps_paused, teacher.samples) == (4, 80)
    assert teacher.samples_per_second == 40
    assert metrics.training_seconds == 3
    assert metrics.test_top1 == {"t": 60, "s": 75}


def test_missing_values_are_none() -> None:
    paused = row("t", loss_sum=0.0, learned=0, tested=None)
    (network,) = EpochMetrics.of(0, 10, ["t"], [paused]).networks
    assert (network.loss, network.test_top1, network.test_top1_ema) == (None, None, None)
    averaged = row("t", tested_average=(1, 4))
    metrics = EpochMetrics.of(0, 10, ["t"], [paused, averaged])
    assert metrics.networks[0].test_top1_ema == 25
    assert EpochMetrics.of(0, 10, ["t"], [paused]).test_top1 == {}
