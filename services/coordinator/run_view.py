"""A run's status as plain values: the documents that `switokd runs`, `status` and `watch` print.

The keys are a contract (`docs/reference/coordinator.md`): later versions may add some. A value
that is not known is None. Times are seconds since 1970-01-01 UTC.

Not covered: tables (`cli/run_tables.py`); a run folder without a coordinator
(`runs/folder_status.py`).
"""

from __future__ import annotations

from typing import Any

from switokd.v1 import coordinator_pb2 as pb

View = dict[str, Any]


def status_view(run_id: str, status: pb.GetRunStatusResponse, coordinator: str) -> View:
    """Return the document of one run. coordinator: the address that was asked."""
    connected = set(status.connected_ranks)
    return {
        "run_id": run_id,
        "state": _name(pb.RunState, status.state),
        "coordinator": coordinator,
        "folder": None,
        "epoch": status.epoch,
        "strategy": status.plan.strategy,
        "started_at": status.started_at or None,
        "ended_at": status.ended_at or None,
        "failure": status.failure or None,
        "last_step": max(status.last_decision.step, status.recorded_step),
        "planned_steps": status.planned_steps or None,
        "training_epoch": status.training_epoch or None,
        "planned_epochs": status.planned_epochs or None,
        "recorded_step": status.recorded_step,
        "decided_alone_steps": status.decided_alone_steps,
        "pairs": _pairs(status),
        "networks": _networks(status),
        "ranks": [_rank(rank, connected) for rank in status.ranks],
        "connected_ranks": sorted(connected),
        "waiting_for": list(status.waiting_for),
        "commands": [_command(command) for command in status.commands],
        "commands_truncated": status.commands_truncated,
    }


def summary_view(summary: pb.RunSummary, coordinator: str) -> View:
    """Return the document of one run in a list."""
    return {
        "run_id": summary.run_id,
        "state": _name(pb.RunState, summary.state),
        "coordinator": coordinator,
        "epoch": summary.epoch,
        "started_at": summary.started_at or None,
        "ended_at": summary.ended_at or None,
        "failure": summary.failure or None,
        "last_step": summary.last_step,
        "ranks": summary.ranks,
        "connected_ranks": summary.connected_ranks,
        "networks": [_network(network) for network in summary.networks],
    }


def _network(network: pb.Network) -> View:
    return {
        "name": network.name,
        "role": _name(pb.Role, network.role),
        "ranks": list(network.ranks),
    }


def _pairs(status: pb.GetRunStatusResponse) -> list[View]:
    """Return the pairs of the last decision, with what was counted of them."""
    counted = {(pair.teacher, pair.student): pair for pair in status.pairs}
    views = []
    for pair in status.last_decision.pairs:
        counts = counted.get((pair.teacher, pair.student))
        views.append(
            {
                "teacher": pair.teacher,
                "student": pair.student,
                "gap": pair.gap,
                "threshold": pair.delta,
                "margin": pair.gap - pair.delta,
                "mode": _name(pb.Mode, pair.mode),
                "expert_ratio": counts.expert_ratio if counts else None,
                "switches": counts.switches if counts else None,
                "held": pair.held,
                "threshold_scale": pair.delta_scale or 1.0,
            }
        )
    return views


def _networks(status: pb.GetRunStatusResponse) -> list[View]:
    paused, measured = set(status.last_decision.paused), {n.name: n for n in status.networks}
    views = []
    for network in status.plan.networks:
        numbers = measured.get(network.name, pb.NetworkStatus())
        is_teacher = network.role == pb.ROLE_TEACHER
        views.append(
            {
                **_network(network),
                "is_paused": network.name in paused if is_teacher else None,
                "paused_ratio": numbers.paused_ratio if is_teacher and numbers.name else None,
                "samples": numbers.samples,
                **{name: _optional(numbers, name) for name in ("loss", "accuracy")},
                "test_accuracy": _optional(numbers, "test_accuracy"),
            }
        )
    return views


def _rank(rank: pb.RankStatus, connected: set[int]) -> View:
    heartbeat = rank.heartbeat
    return {
        "rank": rank.rank,
        "networks": list(rank.networks),
        "is_connected": rank.rank in connected,
        "phase": _name(pb.Phase, heartbeat.phase),
        "step": heartbeat.step,
        "phase_seconds": heartbeat.phase_seconds + rank.seconds_since_heartbeat,
        "heartbeat_age_seconds": rank.seconds_since_heartbeat,
        "lag_steps": rank.lag_steps,
        "is_waited_for": rank.is_waited_for,
    }


ACTION_NAMES = {"scale_threshold": "scale", "save_checkpoint": "checkpoint"}
"""Actions that are named otherwise on the command line and in commands.jsonl."""


def _command(status: pb.CommandStatus) -> View:
    command = status.command
    action = command.WhichOneof("action")
    values: View = {}
    if action:
        message = getattr(command, action)
        values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    if action == "scale_threshold":
        values["teacher"] = values["teacher"] or None  # all teachers
    if "mode" in values:
        values["mode"] = _name(pb.Mode, values["mode"])
    return {
        "command_id": command.command_id,
        "action": ACTION_NAMES.get(action or "", action),
        "arguments": values,
        "first_step": status.first_step or None,
        "failure": status.failure or None,
    }


def _optional(numbers: pb.NetworkStatus, name: str) -> float | None:
    return getattr(numbers, name) if numbers.HasField(name) else None  # type: ignore[arg-type]


def _name(enum: Any, number: int) -> str:
    """Return the name of an enum's value in lower case, without the enum's own; or "unknown"."""
    names = {value: name for name, value in enum.items() if value}
    # RUN_STATE_FINISHED is "finished", MODE_EXPERT "expert".
    prefix = names[1].rpartition("_")[0]
    return names[number].removeprefix(f"{prefix}_").lower() if number in names else "unknown"
