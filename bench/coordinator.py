"""Reports per second that one coordinator handles on one core, and the latency of a decision.

A real coordinator process has a core of its own. The load (`bench.load`) runs in this process, on
another core. Ranks report as in training: step s + 1 follows the decision of step s. With several
ranks per run, a latency therefore includes the wait for the slowest rank's report. On a machine
with one core both share the core, and the figures are too low.

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
from bench.load import TOPOLOGY, Load, Rank, run_plan
from bench.machine import busy_seconds
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc

TEACHERS = ("teacher1", "teacher2")
PAIRS = [
    pb.PairSums(teacher=t, student="student", gap=57.25, e_s=101.125, e_t=44.0625, n=64)
    for t in TEACHERS
]
TARGET_PER_SECOND = 5000
PINS = hasattr(os, "sched_setaffinity")
COMMAND = [sys.executable, "-m", "switokd", "coordinator", "--port", "0", "--http-port", "0"]
COMMAND += ["--message-rate", "1e6", "--message-burst", "1e6"]  # one rank may be that fast here


@dataclass(frozen=True)
class Case:
    """One load: one line of the table."""

    ranks: int
    runs: int
    apart: bool = False
    """True: each network has its own ranks, and the student's ranks, a third, only receive
    decisions. False: each rank holds all networks."""
    paced: bool = False
    """Whether the load is `TARGET_PER_SECOND` reports per second, instead of the maximum."""


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
    """Measurements of one case. Latencies are those of ranks that wait for decisions."""

    ranks: int
    runs: int
    apart: bool
    paced: bool
    reports_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_report: float
    """CPU time of the coordinator, all threads."""
    load_cpu_us_per_report: float
    capacity_per_second: float
    """Reports per second of CPU time: the rate on a core without other processes."""
    resident_mib: float
    core_taken: float | None
    """Share of the coordinator's core that other processes took, 0 to 1; None without pinning.

    Latencies and reports per second are reliable only if this share is near 0.
    """


FIGURES = ("coordinator_reports_per_second", "coordinator_p99_ms", "coordinator_memory_growth")


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield coordinator_reports_per_second, with a table of all cases, and coordinator_p99_ms."""
    say("the coordinator under load")
    seconds = 0.2 if quick else 5.0
    results = [measure_case(case, seconds) for case in CASES]
    main_results = [results[CASES.index(MAIN)]]
    if not quick:
        main_results += [measure_case(MAIN, seconds) for _ in range(2)]
    per_second, p99, growth = FIGURES
    yield Figure(
        per_second,
        tuple(result.reports_per_second for result in main_results),
        target=float(TARGET_PER_SECOND),
        what="reports per second that one coordinator handles on one core, 64 ranks",
        details={"rows": [asdict(result) for result in results]},
    )
    yield Figure(
        p99,
        tuple(result.p99_ms for result in main_results),
        target=10.0,
        at_least=False,
        what="milliseconds from a report to its decision, 99th percentile, under the same load",
    )
    say("the coordinator's memory")
    reports = 2_000 if quick else 1_000_000
    yield Figure.of_pairs(
        growth,
        [measure_memory(reports)],
        target=1.05,
        at_least=False,
        what=f"resident memory after {reports:,} reports over that after a tenth of them, 64 ranks",
    )


def measure_memory(reports: int) -> tuple[float, float]:
    """Return the coordinator's resident MiB after `reports`, and after a tenth of them."""
    with coordinator() as (process, address, _):
        load = Load(address, join(address, MAIN), PAIRS)
        sent, memory = 0, []
        for goal in (reports // 10, reports):
            while sent < goal:
                sent += load.drive(min(1.0, reports / 100_000)).reports
            memory.append(process.memory_info().rss / 2**20)
        load.close()
    before, after = memory
    return after, before


def measure_case(case: Case, seconds: float) -> Result:
    """Measure one case with a new coordinator process."""
    with coordinator() as (process, address, core):
        ranks = join(address, case)
        load = Load(address, ranks, PAIRS)
        pace = case.ranks / TARGET_PER_SECOND if case.paced else 0.0
        load.drive(seconds / 5, pace)  # warm-up
        both = (process, psutil.Process())
        before, busy_before = [_cpu_seconds(p) for p in both], busy_seconds([core])
        outcome = load.drive(seconds, pace)
        busy = busy_seconds([core]) - busy_before
        used, by_load = (_cpu_seconds(p) - b for p, b in zip(both, before, strict=True))
        memory = process.memory_info().rss / 2**20
        load.close()
    latencies = sorted(outcome.latencies)
    return Result(
        **asdict(case),
        reports_per_second=outcome.reports / outcome.seconds,
        p50_ms=1e3 * latencies[len(latencies) // 2],
        p99_ms=1e3 * latencies[len(latencies) * 99 // 100],
        cpu_us_per_report=1e6 * used / outcome.reports,
        load_cpu_us_per_report=1e6 * by_load / outcome.reports,
        capacity_per_second=outcome.reports / used,
        resident_mib=memory,
        core_taken=max(busy - used, 0.0) / outcome.seconds if PINS else None,
    )


@contextmanager
def coordinator() -> Iterator[tuple[psutil.Process, str, int]]:
    """Start a coordinator on one core, and keep this process on the other cores."""
    cores = sorted(os.sched_getaffinity(0)) if PINS else []
    if cores:
        os.sched_setaffinity(0, cores[:1])  # the child process inherits this
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


def join(address: str, case: Case) -> list[Rank]:
    """Register the runs and return their ranks, which are not connected yet."""
    world = case.ranks // case.runs
    everywhere = [list(range(world))] * len(TOPOLOGY)
    apart = [list(range(i, world, len(TOPOLOGY))) for i in range(len(TOPOLOGY))]
    ranks_by_network = apart if case.apart else everywhere
    plan = run_plan(ranks_by_network)
    ranks = []
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.CoordinatorServiceStub(channel)
        for run in range(case.runs):
            for rank in range(world):
                stub.Join(pb.JoinRequest(run_id=f"run{run}", rank=rank, plan=plan))
                held = zip(TEACHERS, ranks_by_network, strict=False)
                teachers = [teacher for teacher, of_teacher in held if rank in of_teacher]
                ranks.append(Rank(f"run{run}", rank, tuple(teachers)))
    return ranks


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
