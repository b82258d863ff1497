"""The observers of a run in its run file: their names, when trackers write, and traces.

Not covered: the observers themselves (`runs/observers.py`, `runs/trackers/`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from switokd.config.base import Section
from switokd.errors import nearest

TRACKERS = ("tensorboard", "mlflow", "wandb")
"""Observers that come with the package."""


class Tracking(Section):
    """How the observers work."""

    every_steps: Annotated[int, Field(ge=1)] = 10
    """Steps per row of numbers that trackers write; a row holds means over these steps."""
    on_error: Literal["continue", "stop"] = "continue"
    """What happens if an observer raises an error. continue: one line says so, the observer gets
    no more events, and the training goes on; stop: the run ends."""
    traces_every: Annotated[int, Field(ge=0)] = 0
    """Steps per OpenTelemetry trace, which shows the phases of one step on all ranks, and its
    round at the coordinator; 0: no traces. Needs the extra otel."""
    kwargs: dict[str, dict[str, Any]] = Field(default={})
    """Keyword arguments by observer, such as {mlflow: {experiment: digits}}."""


def check_observers(observers: Sequence[str], tracking: Tracking) -> None:
    """ValueError, with a line for each, for observers that do not exist or are named twice."""
    found = [
        f"observers: {name!r} is not one of {', '.join(TRACKERS)}, or package.module:Class"
        f"{nearest(name, TRACKERS)}"
        for name in observers
        if ":" not in name and name not in TRACKERS
    ]
    twice = [name for name, count in Counter(observers).items() if count > 1]
    found += [f"observers: {name} is named twice" for name in twice]
    known = ", ".join(observers) or "none"
    found += [
        f"tracking.kwargs: {name!r} is no observer of the run (observers: {known})"
        for name in tracking.kwargs
        if name not in observers
    ]
    if found:
        raise ValueError("\n".join(found))
