"""How long others wait while a stranger's burst of cheap calls comes to the coordinator.

Two processes beside a run: one makes thousands of calls of GetRunStatus at once, over several
connections; the other joins new runs, one after another. The run's ranks report 20 steps a second.

Not covered: bursts of other calls; calls that are refused at once, as those over the rate are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from bench.coordinator import PAIRS, Case, coordinator, join
from bench.figures import Figure, Say
from bench.load import Load
from bench.machine import REPOSITORY

RUN = Case(8, 1)
STEP_SECONDS = 0.05
BURSTS = ((0, 0), (8, 16_000), (40, 8_000))
"""Connections and calls of each burst; the first one is none."""
QUICK_BURSTS = ((0, 0), (2, 100))
FIGURES = ("burst_round_p99_ms", "burst_join_s")


@dataclass(frozen=True)
class Result:
    """One burst: one line of the table."""

    connections: int
    calls: int
    answered: int
    """Calls that were answered while the run was measured."""
    round_p50_ms: float
    round_p99_ms: float
    round_most_ms: float
    """From a rank's report to its decision."""
    joins: int
    join_p50_ms: float
    join_most_ms: float


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield the longest waits beside all bursts; the first figure has a table of them."""
    results = []
    for connections, calls in QUICK_BURSTS if quick else BURSTS:
        say(f"a burst of {calls} calls over {connections} connections")
        results.append(measure_burst(connections, calls, 1.0 if quick else 15.0))
    of_rounds, of_joins = FIGURES
    yield Figure(
        of_rounds,
        (max(result.round_p99_ms for result in results),),
        what="milliseconds from a report to its decision, 99th percentile, beside the worst burst",
        details={"rows": [asdict(result) for result in results]},
    )
    yield Figure(
        of_joins,
        (max(result.join_most_ms for result in results) / 1e3,),
        what="longest seconds of a new run's Join beside the worst burst",
    )


def measure_burst(connections: int, calls: int, seconds: float) -> Result:
    """Drive a run for `seconds` beside a burst, with a new coordinator."""
    with coordinator() as (_, address, _):
        load = Load(address, join(address, RUN), PAIRS)
        load.drive(seconds / 5, STEP_SECONDS)  # warm-up
        with _other("burst", address, connections, calls) as burst, _other("join", address) as new:
            outcome = load.drive(seconds, STEP_SECONDS)
        load.close()
    rounds, joins = sorted(outcome.latencies), sorted(new)
    return Result(
        connections,
        calls,
        burst[0],
        1e3 * median(rounds),
        1e3 * rounds[len(rounds) * 99 // 100],
        1e3 * rounds[-1],
        len(joins),
        1e3 * median(joins),
        1e3 * joins[-1],
    )


@contextmanager
def _other(*words: object) -> Iterator[list[Any]]:
    """Run one of the two processes meanwhile; afterwards the list holds what it has printed."""
    printed: list[Any] = []
    command = [sys.executable, "-m", "bench.callers", *map(str, words)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as child:  # type: ignore[call-overload]
        try:
            child.stdout.readline()  # it begins
            yield printed
            output, _ = child.communicate("", timeout=30)
            printed.extend(json.loads(output))
        finally:
            child.kill()
