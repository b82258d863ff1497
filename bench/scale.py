"""How many runs and ranks one coordinator on one core holds, and whether one run slows the others.

The largest cases of `bench.coordinator`, and its load with and without a run that floods: one rank
that reports the next step, or repeats a report, as fast as the coordinator reads.

Not covered: a flood from many streams, which the coordinator's limits cut short; several machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict

import grpc

from bench.coordinator import (
    PAIRS,
    TEACHERS,
    Case,
    coordinator,
    join,
    measure_case,
)
from bench.figures import Figure, Say, alternate
from bench.load import TOPOLOGY, Flood, Load, request, run_plan
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc

MANY_RUNS, ONE_LARGE, MOST_STREAMS = Case(1600, 200), Case(1024, 1), Case(6400, 100)
CASES = tuple(
    case
    for largest in (MANY_RUNS, ONE_LARGE, MOST_STREAMS)
    for case in (largest, Case(largest.ranks, largest.runs, paced=True))
)
QUICK_CASES = (Case(16, 2), Case(16, 2, paced=True))
FIGURES = ("scale_reports_per_second", "scale_slowed_by_reports", "scale_slowed_by_repeats")


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield the figures; the first has a table of all cases."""
    allow_many_files()
    cases, seconds = (QUICK_CASES, 0.2) if quick else (CASES, 10.0)
    results = []
    for case in cases:
        say(f"{case.runs} runs, {case.ranks} ranks{', paced' if case.paced else ''}")
        results.append(measure_case(case, seconds))
    per_second, *slowed = FIGURES
    yield Figure(
        per_second,
        (results[0].reports_per_second,),
        target=5000.0,
        what=f"reports per second of {cases[0].runs} runs, {cases[0].ranks} ranks, on one core",
        details={"rows": [asdict(result) for result in results]},
    )
    for name, message in zip(slowed, (next_report, same_report), strict=True):
        say(name)
        yield Figure.of_pairs(
            name,
            alternate(
                1 if quick else 3,
                lambda: measure_flooded(cases[0], seconds, None),
                lambda message=message: measure_flooded(cases[0], seconds, message),  # type: ignore[misc]
            ),
            target=1.1,
            at_least=False,
            what="time of a report of the others, without over with a run that floods",
        )


def next_report(step: int) -> bytes:
    """Return the report of a step, which is decided at once."""
    report = pb.Report(step=step, pairs=PAIRS, received_step=step - 1)
    return request(pb.TrainRequest(report=report))


def same_report(_: int, report: bytes = next_report(1)) -> bytes:
    """Return the report of step 1, which the coordinator ignores from the second time on."""
    return report


def measure_flooded(case: Case, seconds: float, message: Callable[[int], bytes] | None) -> float:
    """Return the reports per second of a case, beside a flood of these messages; None: none."""
    with coordinator() as (_, address, _):
        load = Load(address, join(address, case), PAIRS)
        if message:
            load.add_flood(_flood(address, message))
        load.drive(seconds / 5)  # warm-up
        outcome = load.drive(seconds)
        load.close()
    return outcome.reports / outcome.seconds


def _flood(address: str, message: Callable[[int], bytes]) -> Flood:
    """Join one more run, whose only rank floods."""
    plan = run_plan([[0]] * len(TOPOLOGY))
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.CoordinatorServiceStub(channel)
        stub.Join(pb.JoinRequest(run_id="flood", rank=0, plan=plan))
    flood = Flood("flood", 0, TEACHERS)
    flood.start(address, message)
    return flood


def allow_many_files() -> None:
    """Raise the limit of open files: each rank is a connection of this process."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
