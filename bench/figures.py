"""Figures: a measured value, the pairs of measurements behind it, and its target.

Other processes on a shared machine change from minute to minute. A figure is therefore the ratio
of two sides that are measured alternately, A B A B: one ratio per round, and their median.

Not covered: statistical significance. A spread wider than the distance to the target is a warning.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

Say = Callable[[str], None]
"""Prints a line about the progress."""


@dataclass(frozen=True)
class Figure:
    """One measured value with its target: one line of the table."""

    name: str
    rounds: tuple[float, ...]
    """Values of the rounds."""
    pairs: tuple[tuple[float, float], ...] = ()
    """Measurements of both sides, by round."""
    target: float | None = None
    at_least: bool = True
    """Whether the target is a lower bound."""
    what: str = ""
    """Description of the value, with its unit."""
    simulation: bool = False
    """Whether networks wait instead of computing."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further numbers for results.json; the key `rows` is printed as a table."""

    @classmethod
    def of_pairs(cls, name: str, pairs: Sequence[tuple[float, float]], **more: Any) -> Figure:
        """Figure with the ratio a / b of each pair (a, b)."""
        return cls(name, tuple(a / b for a, b in pairs), tuple(pairs), **more)

    @property
    def value(self) -> float:
        """Median of the rounds."""
        return median(self.rounds)

    @property
    def reached(self) -> bool | None:
        """Whether the value reaches the target; None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def to_json(self) -> dict[str, Any]:
        """Content for results.json."""
        statistics = {
            "median": self.value,
            "min": min(self.rounds),
            "max": max(self.rounds),
            "reached": self.reached,
        }
        return asdict(self) | statistics


def alternate(
    rounds: int, a: Callable[[], float], b: Callable[[], float]
) -> list[tuple[float, float]]:
    """Measure A and B alternately, once per round."""
    return [(a(), b()) for _ in range(rounds)]


def one_by_one(makers: Mapping[str, Callable[[], Figure]], say: Say) -> Iterable[Figure]:
    """Yield the figures one after another; a failure of one figure does not stop the others.

    Meant for machines that are lent for minutes. RuntimeError at the end names the failed figures.
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
        raise RuntimeError(f"could not be measured: {', '.join(failed)}")
