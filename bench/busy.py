"""How long one report keeps the coordinator's event loop busy, for the largest runs that it takes.

The reports of a step go through a session each, without gRPC and its threads. The last report of a
step decides it: its sums are added up, the decision is made, and given to the first streams, whose
senders wait for it. The other streams get it in pieces that cost less.

Not covered: sending, which gRPC does in pieces; garbage collections; plans, which a thread reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median

from bench.figures import Figure, Say
from switokd.services.coordinator.limits import DEFAULTS
from switokd.services.coordinator.messages import plan_from_wire
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.session import Session
from switokd.v1 import coordinator_pb2 as pb

FIGURES = ("report_busy_ms",)
CASES = ((4, 6, 1), (4, 6, 170), (2, 2, 1024))
"""Teachers, students and ranks, each of which holds all networks: as many pairs, parts and ranks as
the default limits allow."""
QUICK_CASES = ((2, 2, 4),)
SETTLE_STEPS = 5
"""Steps after which a step is settled."""


@dataclass(frozen=True)
class Result:
    """One run: one line of the table. Times of one report, in milliseconds."""

    pairs: int
    ranks: int
    parts: int
    last_p50_ms: float
    last_p90_ms: float
    other_p50_ms: float
    other_p90_ms: float


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield the longest median, with a table of all cases."""
    say("reports of the largest runs")
    cases, steps = (QUICK_CASES, 5) if quick else (CASES, 100)
    results = [asyncio.run(measure_case(*case, steps)) for case in cases]
    yield Figure(
        FIGURES[0],
        (max(result.last_p50_ms for result in results),),
        target=1.0,
        at_least=False,
        what="milliseconds that the last report of a step takes the event loop, largest runs",
        details={"rows": [asdict(result) for result in results]},
    )


async def measure_case(teachers: int, students: int, ranks: int, steps: int) -> Result:
    """Let all ranks of a run report so many steps. Rank 0, of the first part, comes last."""
    plan = _plan(teachers, students, ranks)
    sessions = await _attached(plan)
    last: list[float] = []
    others: list[float] = []
    for step in range(1, steps + 1):
        decisions = [asyncio.create_task(session.outbox.get()) for session in sessions.values()]
        await asyncio.sleep(0)  # now they wait
        for rank in reversed(sessions):
            report = _report(plan, rank, step)
            began = time.perf_counter()
            sessions[rank].receive(report)
            (others if rank else last).append(1e3 * (time.perf_counter() - began))
        for response in await asyncio.gather(*decisions):
            assert isinstance(response, bytes), response
            assert pb.TrainResponse.FromString(response).decision.step == step
    others = others or last
    return Result(
        len(plan.topology.pairs),
        ranks,
        plan.part_count,
        median(last),
        sorted(last)[len(last) * 9 // 10],
        median(others),
        sorted(others)[len(others) * 9 // 10],
    )


def _plan(teachers: int, students: int, ranks: int) -> Plan:
    roles = [(f"t{i}", pb.ROLE_TEACHER) for i in range(teachers)]
    roles += [(f"s{i}", pb.ROLE_STUDENT) for i in range(students)]
    networks = [pb.Network(name=name, role=role, ranks=range(ranks)) for name, role in roles]
    plan = plan_from_wire(
        pb.RunPlan(
            networks=networks,
            strategy="switokd",
            config_digest="bench",
            round_timeout_seconds=60.0,
        )
    )
    plan.prepare()
    assert len(plan.topology.pairs) <= DEFAULTS.max_pairs
    assert plan.part_count <= DEFAULTS.max_parts
    return plan


async def _attached(plan: Plan) -> dict[int, Session]:
    """Return an attached session of each rank of a new run."""
    runs = RunRegistry(Metrics())
    for rank in plan.networks_of:
        runs.join("run", rank, plan, 0.0)
    sessions = {}
    for rank in plan.networks_of:
        sessions[rank] = Session(runs)
        attach = pb.Attach(run_id="run", rank=rank)
        sessions[rank].handle(pb.TrainRequest(attach=attach))
        response = await sessions[rank].outbox.get()
        assert isinstance(response, bytes), response
        assert pb.TrainResponse.FromString(response).HasField("attached")
    return sessions


def _report(plan: Plan, rank: int, step: int) -> bytes:
    pairs = [
        pb.PairSums(teacher=p.teacher, student=p.student, gap=57.25, e_s=101.125, e_t=44.0625, n=64)
        for p in plan.pairs_of[rank]
    ]
    report = pb.Report(
        step=step,
        pairs=pairs,
        received_step=step - 1,
        settled_step=max(step - SETTLE_STEPS, 0),
        decision_wait_seconds=1e-3,
        exchange_seconds=1e-3,
    )
    return pb.TrainRequest(report=report).SerializeToString()
