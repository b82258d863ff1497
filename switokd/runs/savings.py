"""Time that the pauses of a run saved, estimated from the run's own measurements.

Not covered: savings on other hardware (`planning/cost_model.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any


def wall_seconds(
    passed_at: Iterable[Mapping[int, float]], paused: Mapping[int, Sequence[str]]
) -> float | None:
    """Estimate the seconds that the run would have taken longer without pauses.

    passed_at: end of the exchange in seconds, by step, for each epoch. The time between two ends
    is one step, because backward pass and optimizer step lie between two exchanges.
    paused: names of the paused teachers, by step.
    Steps with the same paused teachers are compared, by the median, with steps without pauses.
    Returns None if no step was without pauses.
    """
    durations: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for epoch in passed_at:
        for step, start in epoch.items():
            if step + 1 in epoch:
                durations[tuple(paused.get(step, ()))].append(epoch[step + 1] - start)
    learning = durations.pop((), [])
    if not learning:
        return None
    usual = median(learning)
    return sum(len(seconds) * (usual - median(seconds)) for seconds in durations.values())


def device_seconds(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Seconds of backward passes and optimizer steps that pauses saved, summed over ranks.

    rows: one per rank, epoch and network, with the keys `network`, `steps_paused`,
    `steps_learned` and `learning_seconds`.
    The estimate for a paused step is the mean duration of the network's learning steps. Returns
    None if a paused network never learned.
    """
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for key in ("steps_paused", "steps_learned", "learning_seconds"):
            totals[row["network"]][key] += row[key]
    paused = [total for total in totals.values() if total["steps_paused"]]
    if not all(total["steps_learned"] for total in paused):
        return None
    return float(
        sum(t["steps_paused"] * t["learning_seconds"] / t["steps_learned"] for t in paused)
    )


def teachers_device_seconds(rows: Iterable[Mapping[str, Any]]) -> float:
    """Seconds of backward passes and optimizer steps on the teachers' ranks, summed over ranks.

    rows: one per rank, epoch and network, with the keys `role` and `learning_seconds`.
    """
    return float(sum(row["learning_seconds"] for row in rows if row["role"] == "teacher"))
