"""Figures: a value with the pairs it was taken from, and the target it is held against.

Machines are shared, and what else runs on them changes from minute to minute. So a figure is a
ratio of two sides that are measured in turn, A B A B; each round gives a ratio, the figure is their
median.

Not covered: significance; a spread wider than the distance to the target says enough.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

Say = Callable[[str], None]
"""Shows what is going on."""


@dataclass(frozen=True)
class Figure:
    """One line of the table. `rounds` are the single values, `pairs` what each was taken from."""

    name: str
    rounds: tuple[float, ...]
    pairs: tuple[tuple[float, float], ...] = ()
    target: float | None = None
    at_least: bool = True
    """Whether the target is a lower bound."""
    what: str = ""
    """What the value is, and of what."""
    simulation: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_pairs(cls, name: str, pairs: Sequence[tuple[float, float]], **more: Any) -> Figure:
        """Median of the ratios of each round's two sides."""
        return cls(name, tuple(a / b for a, b in pairs), tuple(pairs), **more)

    @property
    def value(self) -> float:
        """The median round."""
        return median(self.rounds)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def record(self) -> dict[str, Any]:
        """All of it, for results.json."""
        worked_out = {
            "median": self.value,
            "min": min(self.rounds),
            "max": max(self.rounds),
            "reached": self.reached,
        }
        return asdict(self) | worked_out


def alternate(
    rounds: int, a: Callable[[], float], b: Callable[[], float]
) -> list[tuple[float, float]]:
    """Measure A and B in turn."""
    return [(a(), b()) for _ in range(rounds)]


def one_by_one(makers: Mapping[str, Callable[[], Figure]], say: Say) -> Iterable[Figure]:
    """Give each figure, by name; RuntimeError in the end that names those that could not be taken.

    For where a machine is only there for minutes: one figure's fault costs no other.
    """
    failed = []
    for name, make in makers.items():
        say(name)
        try:
            figure = make()
        except Exception:
            say(traceback.format_exc())
            failed.append(name)
        else:
            yield figure
    if failed:
        raise RuntimeError(f"could not be taken: {', '.join(failed)}")
