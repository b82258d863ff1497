"""What came out of a comparison: the runs' summaries, their statistics, table, csv and picture.

Torch-free. Spreads are sample standard deviations (n - 1) over seeds.

Not covered: which runs there are (`trials.py`), running them (`runner.py`); whether a
difference between strategies is more than chance.
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
    """One trial as it stands."""

    strategy: str
    seed: int
    summary: Mapping[str, Any] | None
    """What summary.json holds; None if it is not finished."""
    failure: str = ""
    """Why it ended, if it failed."""


@dataclass(frozen=True)
class Statistic:
    """Mean and spread over seeds."""

    mean: float
    spread: float | None
    """Sample standard deviation; None of a single value."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Of one value or more."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.spread:.2f}" if self.spread is not None else "")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """A run's summary.json; None if the run has not written it to its end."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("networks") else None


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison. UsageError if none is finished."""

    name: str
    runs: tuple[TrialResult, ...]

    def __post_init__(self) -> None:
        if not self.finished():
            raise UsageError(f"{self.name}: no run is finished, so there is nothing to compare")

    @property
    def strategies(self) -> list[str]:
        """Labels, in the order in which they were asked for."""
        return list(dict.fromkeys(run.strategy for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """All seeds, finished or not."""
        return sorted({run.seed for run in self.runs})

    def finished(self, strategy: str | None = None) -> list[TrialResult]:
        """Runs that have a summary, of one strategy or of all."""
        of_it = (run for run in self.runs if strategy in (None, run.strategy))
        return [run for run in of_it if run.summary]

    def networks(self) -> dict[str, Mapping[str, Any]]:
        """A finished run's networks by name: role, parameters."""
        return dict(_summary(self.finished()[0])["networks"])

    def values(self, strategy: str, network: str, key: str = "top1_last") -> list[float]:
        """One number of a network, by seed."""
        return [_summary(run)["networks"][network][key] for run in self.finished(strategy)]

    def top1(self, strategy: str, network: str) -> Statistic | None:
        """Top-1 of the last epoch in percent; None if no run is finished."""
        values = self.values(strategy, network)
        return Statistic.of(values) if values else None

    def best(self, network: str) -> set[str]:
        """Strategies with the highest mean top-1 of a network, as the table rounds it."""
        found = {s: self.top1(s, network) for s in self.strategies}
        means = {s: round(t.mean, 2) for s, t in found.items() if t}
        return {s for s, top1 in means.items() if top1 == max(means.values())}

    def paused_share(self, strategy: str) -> float | None:
        """Share of all teachers' steps that were paused, 0 to 1."""
        teachers = [
            network
            for run in self.finished(strategy)
            for network in _summary(run)["networks"].values()
            if network["role"] == "teacher"
        ]
        steps = sum(network["steps"] for network in teachers)
        return sum(network["steps_paused"] for network in teachers) / steps if steps else None

    def wall_seconds(self, strategy: str) -> float | None:
        """Mean duration of a run."""
        seconds = [_summary(run)["wall_seconds"] for run in self.finished(strategy)]
        return mean(seconds) if seconds else None

    def saved(self, strategy: str) -> tuple[float, float | None] | None:
        """Device-seconds that pauses spared the teachers of a run, on average; their share, 0 to 1.

        The share is of what their backward passes and updates would have taken without pauses;
        None where a run has not recorded what they took. None altogether where a run could not
        tell: a teacher that never learned (kd) shows no cost of a step.
        """
        runs = [_saving(run) for run in self.finished(strategy)]
        saved = [s for s, _ in runs if s is not None]
        if not runs or len(saved) < len(runs):
            return None
        spent = [s for _, s in runs if s is not None]
        whole = sum(saved) + sum(spent)
        share = sum(saved) / whole if len(spent) == len(runs) and whole > 0 else None
        return mean(saved), share


def _summary(run: TrialResult) -> Mapping[str, Any]:
    assert run.summary is not None, "only asked of finished runs"
    return run.summary


def _saving(run: TrialResult) -> tuple[float | None, float | None]:
    """Device-seconds that a run's pauses saved, and that its teachers' learning took."""
    found = _summary(run).get("saved_by_pauses") or {}
    return found.get("device_seconds"), found.get("teachers_device_seconds")
