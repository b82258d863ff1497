"""Conversion between wire messages and the coordinator's own classes.

Not covered: sums and decisions, which the client converts as well (`switokd.wire`).
"""

from __future__ import annotations

import grpc

from switokd.distillation.topology import Pair, Topology
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.run import CoordinatedRun, RunState
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import ROLE_FROM_WIRE, ROLE_TO_WIRE, decision_to_wire

STATE_TO_WIRE = {
    RunState.JOINING: pb.RUN_STATE_JOINING,
    RunState.TRAINING: pb.RUN_STATE_TRAINING,
    RunState.FINISHED: pb.RUN_STATE_FINISHED,
    RunState.FAILED: pb.RUN_STATE_FAILED,
}


def status_code(refusal: Refusal) -> grpc.StatusCode:
    """Return the gRPC status code of a refusal."""
    return grpc.StatusCode[refusal.kind.name]


def status_to_wire(run: CoordinatedRun, recorded: int = 0) -> pb.GetRunStatusResponse:
    """Describe a run for GetRunStatus. recorded: last step in the journal on the disk."""
    last = run.last_decision
    return pb.GetRunStatusResponse(
        state=STATE_TO_WIRE[run.state],
        plan=plan_to_wire(run.plan),
        connected_ranks=sorted(run.connected),
        last_decision=decision_to_wire(last) if last else None,
        failure=run.failure,
        epoch=run.epoch,
        recorded_step=recorded,
        decided_alone_steps=run.decided_alone,
    )


def plan_from_wire(message: pb.RunPlan) -> Plan:
    """Return the plan in a message; Refusal if a network has no role."""
    unknown = [n.name for n in message.networks if n.role not in ROLE_FROM_WIRE]
    if unknown:
        raise Refusal(Refusal.Kind.INVALID_ARGUMENT, f"networks without a role: {unknown}")
    return Plan(
        topology=Topology(
            tuple((n.name, ROLE_FROM_WIRE[n.role]) for n in message.networks),
            frozenset(Pair(p.teacher, p.student) for p in message.switched_off),
        ),
        ranks=tuple(tuple(n.ranks) for n in message.networks),
        strategy=message.strategy,
        config_digest=message.config_digest,
        round_timeout=message.round_timeout_seconds,
        strategy_kwargs=message.strategy_kwargs or "{}",
        semantics=message.semantics or "paper",
        first_step=message.first_step or 1,
    )


def plan_to_wire(plan: Plan) -> pb.RunPlan:
    """Return the message of a plan."""
    return pb.RunPlan(
        networks=[
            pb.Network(name=name, role=ROLE_TO_WIRE[role], ranks=ranks)
            for (name, role), ranks in zip(plan.topology.roles, plan.ranks, strict=True)
        ],
        strategy=plan.strategy,
        config_digest=plan.config_digest,
        round_timeout_seconds=plan.round_timeout,
        strategy_kwargs=plan.strategy_kwargs,
        semantics=plan.semantics,
        first_step=plan.first_step,
        switched_off=[
            pb.Pair(teacher=p.teacher, student=p.student) for p in sorted(plan.topology.off)
        ],
    )
