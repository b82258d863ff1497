"""Replays a run: derives its record again, names what differs, and applies other rules to it.

Not covered: how the result is printed (`cli/replay.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from switokd.runs.replay.alternatives import STATEMENT, Alternative, ReplayCount
from switokd.runs.replay.derive import Deriver, Rounded
from switokd.runs.replay.record import Deciding, Record
from switokd.runs.replay.sequence import Difference, Steps

SHOWN = 20
"""Number of differences that are kept by default; all are counted."""
OF_ROWS = ("row", "order")
"""Fields of differences that are of whole rows: they are shown first."""
STEPS_BETWEEN = 2_000
"""Steps between two calls of `on_progress`."""


@dataclass
class Replay:
    """What a replay has found. Sums and shares are over the steps with all their pairs."""

    name: str
    """The run folder, or the run's id."""
    deciding: Deciding
    first_step: int
    """The step that the record must begin with."""
    place: str
    """What the places of the differences count: "line" or "row"."""
    recorded: ReplayCount
    alternatives: list[ReplayCount]
    differences: list[Difference] = field(default_factory=list)
    """The first ones."""
    difference_count: int = 0
    """Number of all differences."""
    rounded: list[Rounded] = field(default_factory=list)
    """Modes that the ranks have settled where rounding matters; these are no differences."""
    rows: int = 0
    held: int = 0
    """Rows whose mode a command of an operator has held."""
    scaled: int = 0
    """Rows whose threshold a command of an operator has scaled."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what was found, and is no difference."""

    @property
    def is_exact(self) -> bool:
        """Whether every decision of the record follows from its distances, bit for bit."""
        return self.difference_count == 0

    def as_dict(self) -> dict[str, Any]:
        """The result for JSON."""
        deciding = self.deciding
        result: dict[str, Any] = {
            "run": self.name,
            "topology": deciding.topology.name,
            "strategy": deciding.strategy,
            "strategy_kwargs": dict(deciding.kwargs),
            "semantics": deciding.semantics,
            "steps": self.recorded.steps,
            "rows": self.rows,
            "held": self.held,
            "scaled": self.scaled,
            "rounded": [asdict(rounded) for rounded in self.rounded],
            "difference_count": self.difference_count,
            "differences": [asdict(difference) for difference in self.differences],
            "notes": self.notes,
            "recorded": self.recorded.as_dict(),
        }
        if self.alternatives:
            result["statement"] = STATEMENT
            result["alternatives"] = [tally.as_dict() for tally in self.alternatives]
        return result


def replay(
    record: Record,
    others: Sequence[Alternative] = (),
    shown: int = SHOWN,
    on_progress: Callable[[float], object] | None = None,
) -> Replay:
    """Derive every decision of a record again; apply other rules to its distances.

    shown: number of differences to keep. on_progress: receives the part that was read, 0 to 1, now
    and then. UsageError if the record cannot be read.
    """
    deciding = record.deciding
    recorded = ReplayCount(deciding.topology, deciding.rule, None)
    tallies = [ReplayCount(deciding.topology, other.rule, other) for other in others]
    of_rows: list[Difference] = []
    of_values: list[Difference] = []
    count = 0

    def tell(difference: Difference) -> None:
        nonlocal count
        count += 1
        kept = of_rows if difference.field in OF_ROWS else of_values
        if len(kept) < shown:
            kept.append(difference)

    deriver = Deriver(record, tell)
    for number, step in enumerate(Steps(record, tell).read()):
        derived = deriver.derive(step.rows, step.follows)
        if derived is not None and step.follows:
            recorded.add(derived)
            for tally in tallies:
                tally.add(derived)
        if on_progress and number % STEPS_BETWEEN == 0:
            on_progress(record.part_read)
    for tally in (recorded, *tallies):
        tally.flush()
    of_rows.sort(key=lambda difference: difference.step)
    return Replay(
        record.name,
        deciding,
        record.first_step,
        record.place,
        recorded,
        tallies,
        [*of_rows, *of_values][:shown],
        count,
        deriver.rounded,
        deriver.rows,
        deriver.held,
        deriver.scaled,
        record.notes,
    )
