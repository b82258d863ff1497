"""What one coordinator takes: its reports per second and how long decisions take meanwhile.

Not covered: measuring it (`coordinator.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from bench import coordinator
from bench.figures import Figure, Say

FIGURES = ("coordinator_reports_per_second", "coordinator_p99_ms")


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give coordinator_reports_per_second and coordinator_p99_ms."""
    say("the coordinator under load")
    found = [coordinator.measure(quick)]
    if not quick:
        found += [coordinator.measure_main(quick) for _ in range(2)]
    per_second, p99 = FIGURES
    yield Figure(
        per_second,
        tuple(each[per_second] for each in found),
        target=float(coordinator.TARGET_PER_SECOND),
        what="reports that one coordinator on one core takes, 64 ranks",
        details=found[0],
    )
    yield Figure(
        p99,
        tuple(each[p99] for each in found),
        target=10.0,
        at_least=False,
        what="milliseconds from a report to its decision, 99th percentile, meanwhile",
    )
