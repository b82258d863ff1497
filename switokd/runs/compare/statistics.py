"""Results of a comparison and their statistics over seeds.

Spreads are sample standard deviations (n - 1).

Not covered: choosing the trials (`trials.py`), running them (`runner.py`), showing the results
(`table.py`, `plot.py`); tests of statistical significance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from switokd.errors import UsageError


@dataclass(frozen=True)
class TrialResult:
    """Result of one trial, finished or not."""

    strategy: str
    """Label of the strategy, with its arguments."""
    seed: int
    summary: Mapping[str, Any]
    """Content of summary.json; empty if the trial is not finished."""
    failure: str = ""
    """Reason of the failure; empty if the trial has not failed."""

    @property
    def networks(self) -> Mapping[str, Any]:
        """Summaries of the networks by name; empty if the trial is not finished."""
        networks: Mapping[str, Any] = self.summary.get("networks", {})
        return networks

    @property
    def saved_device_seconds(self) -> float | None:
        """Device-seconds that pauses saved; None if unknown."""
        savings = self.summary.get("saved_by_pauses") or {}
        seconds: float | None = savings.get("device_seconds")
        return seconds

    @property
    def teachers_device_seconds(self) -> float | None:
        """Device-seconds of the teachers' backward passes and optimizer steps; None if unknown."""
        savings = self.summary.get("saved_by_pauses") or {}
        seconds: float | None = savings.get("teachers_device_seconds")
        return seconds


@dataclass(frozen=True)
class Statistic:
    """Mean and spread over seeds."""

    mean: float
    spread: float | None
    """Sample standard deviation; None for a single value."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Mean and spread of `values`, at least one."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.spread:.2f}" if self.spread is not None else "")


def read_summary(folder: Path) -> dict[str, Any]:
    """Content of a run's summary.json; empty if the run has not written the file completely."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) and summary.get("networks") else {}


@dataclass(frozen=True)
class Comparison:
    """The results of all trials of a comparison. UsageError if no trial is finished."""

    name: str
    results: tuple[TrialResult, ...]

    def __post_init__(self) -> None:
        if not self.finished():
            raise UsageError(f"{self.name}: no run is finished, so there is nothing to compare")

    @property
    def strategies(self) -> list[str]:
        """Labels of the strategies, in the order of the results."""
        return list(dict.fromkeys(result.strategy for result in self.results))

    @property
    def seeds(self) -> list[int]:
        """Seeds of all trials, finished or not, in ascending order."""
        return sorted({result.seed for result in self.results})

    def of_strategy(self, strategy: str) -> list[TrialResult]:
        """Results of one strategy, finished or not."""
        return [result for result in self.results if result.strategy == strategy]

    def finished(self, strategy: str | None = None) -> list[TrialResult]:
        """Results of the finished trials of one strategy, or of all strategies."""
        results = self.results if strategy is None else self.of_strategy(strategy)
        return [result for result in results if result.summary]

    def networks(self) -> dict[str, Mapping[str, Any]]:
        """Networks by name, with their role and number of parameters."""
        return dict(self.finished()[0].networks)

    def values(self, strategy: str, network: str, key: str = "top1_last") -> list[float]:
        """Values of one key of a network's summary, one per finished trial."""
        return [result.networks[network][key] for result in self.finished(strategy)]

    def top1(self, strategy: str, network: str) -> Statistic | None:
        """Top-1 after the last epoch in percent; None if no trial is finished."""
        values = self.values(strategy, network)
        return Statistic.of(values) if values else None

    def best(self, network: str) -> set[str]:
        """Strategies with the highest mean top-1 of a network, after rounding as in the table."""
        statistics = {strategy: self.top1(strategy, network) for strategy in self.strategies}
        means = {strategy: round(top1.mean, 2) for strategy, top1 in statistics.items() if top1}
        return {strategy for strategy, top1 in means.items() if top1 == max(means.values())}

    def paused_share(self, strategy: str) -> float | None:
        """Share of paused steps in all steps of all teachers, 0 to 1; None without steps."""
        teachers = [
            network
            for result in self.finished(strategy)
            for network in result.networks.values()
            if network["role"] == "teacher"
        ]
        steps = sum(network["steps"] for network in teachers)
        return sum(network["steps_paused"] for network in teachers) / steps if steps else None

    def wall_seconds(self, strategy: str) -> float | None:
        """Mean duration of a run in seconds; None if no trial is finished."""
        seconds = [result.summary["wall_seconds"] for result in self.finished(strategy)]
        return mean(seconds) if seconds else None

    def saved(self, strategy: str) -> tuple[float, float | None] | None:
        """Mean device-seconds that pauses saved per run, and their share, 0 to 1.

        The share relates to the teachers' backward passes and optimizer steps without pauses. It is
        None if a run has not recorded their duration. The result is None if a run cannot tell what
        its pauses saved: a teacher that never learns (kd) gives no duration of a step.
        """
        results = self.finished(strategy)
        saved = [s for r in results if (s := r.saved_device_seconds) is not None]
        if not results or len(saved) < len(results):
            return None
        spent = [s for r in results if (s := r.teachers_device_seconds) is not None]
        total = sum(saved) + sum(spent)
        share = sum(saved) / total if len(spent) == len(results) and total > 0 else None
        return mean(saved), share
