"""Conversion between wire messages and the coordinator's own classes.

Not covered: sums and decisions, which the client converts as well (`switokd.wire`).
"""

from __future__ import annotations

import math

import grpc

from switokd.distillation.overrides import Command
from switokd.distillation.topology import Pair, Topology
from switokd.services.coordinator.health import Heartbeat, RankHealth
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.run import CoordinatedRun, RunState
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import (
    PHASE_FROM_WIRE,
    PHASE_TO_WIRE,
    ROLE_FROM_WIRE,
    ROLE_TO_WIRE,
    command_to_wire,
    decision_to_wire,
)

STATE_TO_WIRE = {
    RunState.JOINING: pb.RUN_STATE_JOINING,
    RunState.TRAINING: pb.RUN_STATE_TRAINING,
    RunState.FINISHED: pb.RUN_STATE_FINISHED,
    RunState.FAILED: pb.RUN_STATE_FAILED,
    RunState.STOPPED: pb.RUN_STATE_STOPPED,
}


def status_code(refusal: Refusal) -> grpc.StatusCode:
    """Return the gRPC status code of a refusal."""
    return grpc.StatusCode[refusal.kind.name]


def status_to_wire(run: CoordinatedRun, recorded: int = 0) -> pb.GetRunStatusResponse:
    """Describe a run for GetRunStatus, without its ranks, times and measurements (`status.py`).

    recorded: last step in the journal on the disk.
    """
    last, commands = run.last_decision, run.commands.shown
    return pb.GetRunStatusResponse(
        state=STATE_TO_WIRE[run.state],
        plan=plan_to_wire(run.plan),
        connected_ranks=sorted(run.connected),
        last_decision=decision_to_wire(last) if last else None,
        failure=run.failure,
        epoch=run.epoch,
        recorded_step=recorded,
        decided_alone_steps=run.decided_alone,
        waiting_for=run.health.sentences(),
        commands=[
            pb.CommandStatus(
                command=command_to_wire(stamped.command),
                first_step=stamped.first_step,
                failure=stamped.failure,
            )
            for stamped in commands
        ],
        commands_truncated=len(commands) < len(run.commands.all),
    )


def rank_to_wire(state: RankHealth, plan: Plan, lag: int) -> pb.RankStatus:
    """Describe a rank. lag: steps that it is behind the rank that has reported most."""
    heartbeat = state.heartbeat
    return pb.RankStatus(
        rank=state.rank,
        networks=plan.networks_of[state.rank],
        heartbeat=pb.Heartbeat(
            phase=PHASE_TO_WIRE.get(heartbeat.phase, pb.PHASE_UNSPECIFIED),
            step=heartbeat.step,
            phase_seconds=heartbeat.phase_seconds,
            still_seconds=heartbeat.still_seconds,
            waits=heartbeat.waits,
        ),
        seconds_since_heartbeat=state.age,
        is_waited_for=state.is_waited_for,
        lag_steps=lag,
    )


def heartbeat_from_wire(message: pb.Heartbeat) -> Heartbeat:
    """Return a heartbeat; a phase that this version does not know is called "unknown"."""
    return Heartbeat(
        PHASE_FROM_WIRE.get(message.phase, "unknown"),
        message.step,
        _seconds(message.phase_seconds),
        _seconds(message.still_seconds),
        message.waits,
    )


def _seconds(value: float) -> float:
    """Return a duration that a rank has sent; 0 for one that is none."""
    return value if 0 <= value < math.inf else 0.0


def notice_to_wire(text: str) -> bytes:
    """Return a serialized response with one sentence for the user."""
    return pb.TrainResponse(notice=pb.Notice(text=text)).SerializeToString()


def serialized_command(command: Command) -> bytes:
    """Return a serialized response with a command for rank 0."""
    return pb.TrainResponse(command=command_to_wire(command)).SerializeToString()


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
