"""The metrics of an epoch: the measurements of all ranks, combined by network.

Not covered: the measurements of one rank (`meters.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""Measurements of one network on one rank in one epoch; the keys are in `EpochLog.rows`."""


@dataclass(frozen=True)
class NetworkMetrics:
    """One network's epoch. Top-1 accuracies are in percent."""

    network: str
    role: str
    lr: float
    """Learning rate of the epoch's last step."""
    loss: float | None
    """Mean training loss; None if the network was paused in every step."""
    train_top1: float
    test_top1: float | None
    """None if the epoch had no test."""
    test_top1_ema: float | None
    """Accuracy of the moving average; None without a test or without an average."""
    steps_paused: int
    samples: int
    samples_per_second: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> NetworkMetrics:
        """Combine the rows of one network's ranks."""
        loss_sum, learned, correct, samples = (
            sum(row[key] for row in rows) for key in ("loss_sum", "learned", "correct", "samples")
        )
        return cls(
            network=rows[0]["network"],
            role=rows[0]["role"],
            lr=rows[0]["lr"],
            loss=loss_sum / learned if learned else None,
            train_top1=100 * correct / samples if samples else 0.0,  # all steps were skipped
            test_top1=_top1(rows, "tested"),
            test_top1_ema=_top1(rows, "tested_average"),
            steps_paused=rows[0]["steps_paused"],
            samples=samples,
            samples_per_second=samples / _training_seconds(rows),
        )


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch of all networks."""

    epoch: int
    """Counted from 0."""
    step: int
    """The epoch's last step."""
    rows: Sequence[Row]
    """One row per rank and network."""
    networks: Sequence[NetworkMetrics]

    @classmethod
    def of(cls, epoch: int, step: int, names: Iterable[str], rows: Sequence[Row]) -> EpochMetrics:
        """Combine all ranks' rows into the metrics of the networks `names`, in this order."""
        by_network = defaultdict(list)
        for row in rows:
            by_network[row["network"]].append(row)
        networks = [NetworkMetrics.of(by_network[name]) for name in names]
        return cls(epoch, step, rows, networks)

    @property
    def training_seconds(self) -> float:
        """Duration of the epoch's training on the slowest rank, without the evaluation."""
        return _training_seconds(self.rows)

    @property
    def test_top1(self) -> dict[str, float]:
        """By network: top-1 on the test set in percent; empty if the epoch had no test."""
        return {m.network: m.test_top1 for m in self.networks if m.test_top1 is not None}


def _training_seconds(rows: Sequence[Row]) -> float:
    return float(max(row["training_seconds"] for row in rows))


def _top1(rows: Sequence[Row], key: str) -> float | None:
    """Return the top-1 over all ranks' parts of the test set, in percent; None without a test."""
    parts = [row[key] for row in rows if row[key] is not None]
    if not parts:
        return None
    return float(100 * sum(correct for correct, _ in parts) / sum(n for _, n in parts))
