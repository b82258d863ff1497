"""What the pauses of a run saved, from what was measured in it.

Not covered: what they would have saved on other hardware (`plan.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median


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


def device_seconds(rows: Iterable[Mapping[str, float]]) -> float | None:
    """Seconds of backward and update that paused teachers' ranks were spared, added up.

    rows: a rank's `steps_paused`, `steps_learned` and `learning_seconds`. Each paused step is
    taken to cost what the rank's learning steps did on average; None if one never learned.
    """
    total = 0.0
    for row in rows:
        if not row["steps_paused"]:
            continue
        if not row["steps_learned"]:
            return None
        total += row["steps_paused"] * row["learning_seconds"] / row["steps_learned"]
    return total
