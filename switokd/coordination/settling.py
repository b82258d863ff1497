"""How the ranks of a run settle steps among themselves when the coordinator does not.

Rank 0 decides for the record what the coordinator has not decided, from the reports of all ranks,
with the coordinator's own code. Its decisions are therefore the same.

Not covered: when this is done (`client.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from switokd.distillation.decision import Decision, Rule
from switokd.services.coordinator.messages import plan_from_wire
from switokd.services.coordinator.ranks import Ranks
from switokd.services.coordinator.rounds import Rounds
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import modes_from_wire, sums_from_wire


class Board(Protocol):
    """Texts that the ranks of a run let each other read."""

    def publish(self, key: str, text: str) -> None:
        """Let the other ranks read a text."""
        ...

    def read(self, key: str, seconds: float) -> str | None:
        """Wait for a text that a rank publishes; None if none comes in time."""
        ...


class Peers(Board, Protocol):
    """The other ranks. Every rank must call `gather` and `broadcast` together."""

    def gather(self, mine: Any) -> list[Any]:
        """Return the objects of all ranks on rank 0, an empty list elsewhere."""
        ...

    def broadcast(self, rank_0s: Any) -> Any:
        """Return rank 0's object on every rank."""
        ...


def decide_reports(
    plan: pb.RunPlan, rule: Rule, reports: Sequence[Sequence[bytes]]
) -> list[Decision]:
    """Decide the steps of the ranks' reports.

    reports: by rank, one serialized report per step; every rank has the same steps.
    """
    own_plan = plan_from_wire(plan)
    rounds = Rounds(own_plan, Ranks("", own_plan), rule)
    decisions = []
    for reports_of_step in zip(*reports, strict=True):
        for rank, serialized in enumerate(reports_of_step):
            report = pb.Report.FromString(serialized)
            rounds.settle(report.step - 1)
            sums, (modes, in_force) = sums_from_wire(report), modes_from_wire(report)
            if decided := rounds.report(rank, report.step, sums, 0.0, modes, in_force):
                decisions.append(decided.decision)
    return decisions
