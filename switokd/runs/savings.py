"""What the pauses of a run saved, from what was measured in it.

Not covered: what they would have saved on other hardware (`cost_model.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any


def wall_seconds(
    passed_at: Iterable[Mapping[int, float]], paused: Mapping[int, Sequence[str]]
) -> float | None:
    """How much longer the run would have taken had nobody paused: an estimate.

    passed_at: by epoch, when each step's exchange was over, in seconds; from one to the next it
    is a step, because backward and update lie between two exchanges. paused: each step's paused
    teachers. The steps at which the same teachers paused are compared, by the median, with those
    at which none did; None if there was no such step.
    """
    durations = defaultdict(list)
    for epoch in passed_at:
        for step, began in epoch.items():
            if step + 1 in epoch:
                durations[tuple(paused.get(step, ()))].append(epoch[step + 1] - began)
    learning = durations.pop((), [])
    if not learning:
        return None
    whole = median(learning)
    return sum(len(each) * (whole - median(each)) for each in durations.values())


def device_seconds(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Seconds of backward and update that paused teachers' ranks were spared, added up.

    rows: of each rank, epoch and `network`: `steps_paused`, `steps_learned`, `learning_seconds`.
    A paused step is taken to cost what the network's learning steps did on average; None if a
    paused network never learned.
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
    """Seconds that backward and update did take on the teachers' ranks, added up.

    rows: of each rank, epoch and network: `role`, `learning_seconds`.
    """
    return float(sum(row["learning_seconds"] for row in rows if row["role"] == "teacher"))
