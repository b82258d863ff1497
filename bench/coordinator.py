"""How many reports per second one coordinator takes on one core, and how long a decision takes.

A real coordinator process has one core for itself; the load (`bench.load`) runs here, on another.
Ranks report as in training: step s + 1 once the decision of s is there. With several ranks in a run
a latency therefore holds the wait for the slowest rank's report as well. Where the whole machine
has one core the two share it, and the figures are too low.

Not covered: networks between machines, TLS, runs that start and end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import grpc
import psutil

from bench.figures import Figure, Say
from bench.load import Load, Rank
from bench.machine import busy_seconds
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc

TOPOLOGY = {"teacher1": pb.ROLE_TEACHER, "teacher2": pb.ROLE_TEACHER, "student": pb.ROLE_STUDENT}
TEACHERS = ("teacher1", "teacher2")
PAIRS = [
    pb.PairSums(teacher=t, student="student", gap=57.25, e_s=101.125, e_t=44.0625, n=64)
    for t in TEACHERS
]
TARGET_PER_SECOND = 5000
PINS = hasattr(os, "sched_setaffinity")
COMMAND = [sys.executable, "-m", "switokd", "coordinator", "--port", "0", "--http-port", "0"]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    ranks: int
    runs: int
    apart: bool = False
    """Each network on ranks of its own, so that a third of the ranks only listen; else each rank
    holds all networks."""
    paced: bool = False
    """Steps begin at `TARGET_PER_SECOND` reports per second instead of as fast as they can."""


MAIN = Case(64, 1)
CASES = (
    Case(1, 1),
    Case(16, 1),
    MAIN,
    Case(16, 16),
    Case(64, 16),
    Case(64, 1, apart=True),
    Case(64, 1, paced=True),
)


@dataclass(frozen=True)
class Result:
    """What was measured in one case. Latencies are those of ranks that wait for decisions."""

    ranks: int
    runs: int
    apart: bool
    paced: bool
    reports_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_report: float
    """The coordinator's processor time, all threads."""
    load_cpu_us_per_report: float
    capacity_per_second: float
    """Reports per second of processor time: what a core gives that nothing else takes."""
    resident_mib: float
    core_taken: float | None
    """Share of the coordinator's core that others took meanwhile (0 to 1); None where it cannot be
    pinned. Latencies and reports per second are worth what this is near 0."""


FIGURES = ("coordinator_reports_per_second", "coordinator_p99_ms")


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give coordinator_reports_per_second and coordinator_p99_ms; the former has all cases."""
    say("the coordinator under load")
    seconds = 1.0 if quick else 5.0
    results = [measure_case(case, seconds) for case in CASES]
    mains = [results[CASES.index(MAIN)]]
    if not quick:
        mains += [measure_case(MAIN, seconds) for _ in range(2)]
    per_second, p99 = FIGURES
    yield Figure(
        per_second,
        tuple(each.reports_per_second for each in mains),
        target=float(TARGET_PER_SECOND),
        what="reports that one coordinator on one core takes, 64 ranks",
        details={"rows": [asdict(result) for result in results]},
    )
    yield Figure(
        p99,
        tuple(each.p99_ms for each in mains),
        target=10.0,
        at_least=False,
        what="milliseconds from a report to its decision, 99th percentile, meanwhile",
    )


def measure_case(case: Case, seconds: float) -> Result:
    """Start a coordinator, put the load on it, stop it."""
    with _coordinator() as (process, address, core):
        ranks = _join(address, case)
        load = Load(address, ranks, PAIRS)
        pace = case.ranks / TARGET_PER_SECOND if case.paced else 0.0
        load.drive(seconds / 5, pace)  # warm-up
        us, them = psutil.Process(), process
        before, busy_before = [_cpu_seconds(p) for p in (them, us)], busy_seconds([core])
        outcome = load.drive(seconds, pace)
        busy = busy_seconds([core]) - busy_before
        theirs, ours = (_cpu_seconds(p) - b for p, b in zip((them, us), before, strict=True))
        memory = process.memory_info().rss / 2**20
        load.close()
    latencies = sorted(outcome.latencies)
    return Result(
        **asdict(case),
        reports_per_second=outcome.reports / outcome.seconds,
        p50_ms=1e3 * latencies[len(latencies) // 2],
        p99_ms=1e3 * latencies[len(latencies) * 99 // 100],
        cpu_us_per_report=1e6 * theirs / outcome.reports,
        load_cpu_us_per_report=1e6 * ours / outcome.reports,
        capacity_per_second=outcome.reports / theirs,
        resident_mib=memory,
        core_taken=max(busy - theirs, 0.0) / outcome.seconds if PINS else None,
    )


@contextmanager
def _coordinator() -> Iterator[tuple[psutil.Process, str, int]]:
    """A coordinator, its address and its core; this process keeps to the others meanwhile."""
    cores = sorted(os.sched_getaffinity(0)) if PINS else []
    if cores:
        os.sched_setaffinity(0, cores[:1])  # the child inherits it
    with subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        if cores:
            os.sched_setaffinity(0, cores[1:] or cores)
        try:
            assert child.stdout is not None
            ready = json.loads(child.stdout.readline())
            yield psutil.Process(child.pid), ready["grpc"], cores[0] if cores else 0
        finally:
            child.terminate()
            if cores:
                os.sched_setaffinity(0, cores)


def _join(address: str, case: Case) -> list[Rank]:
    """Make the runs known and return their ranks, not yet connected."""
    world = case.ranks // case.runs
    everywhere = [list(range(world))] * len(TOPOLOGY)
    own = [list(range(i, world, len(TOPOLOGY))) for i in range(len(TOPOLOGY))]
    held = own if case.apart else everywhere
    plan = pb.RunPlan(
        networks=[
            pb.Network(name=name, role=role, ranks=ranks)
            for (name, role), ranks in zip(TOPOLOGY.items(), held, strict=True)
        ],
        strategy="switokd",
        config_digest="bench",
        round_timeout_seconds=60.0,
    )
    ranks = []
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.CoordinatorServiceStub(channel)
        for run in range(case.runs):
            for rank in range(world):
                stub.Join(pb.JoinRequest(run_id=f"run{run}", rank=rank, plan=plan))
                teachers = [t for t, ranks_ in zip(TEACHERS, held, strict=False) if rank in ranks_]
                ranks.append(Rank(f"run{run}", rank, tuple(teachers)))
    return ranks


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
