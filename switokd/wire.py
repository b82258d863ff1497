"""Converts sums, decisions and commands between wire messages and dataclasses.

Only the client and the coordinator use it; all other code knows only the dataclasses.

Not covered: messages that only one side converts (`coordination/client.py`,
`services/coordinator/messages.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from types import MappingProxyType

from switokd.distillation.decision import NOTHING, Decision, InForce, Mode, PairDecision
from switokd.distillation.gap import Distances, PairSums
from switokd.distillation.overrides import Action, Command, Stamped
from switokd.distillation.topology import Pair, Role
from switokd.v1 import coordinator_pb2 as pb

ROLE_TO_WIRE = {Role.TEACHER: pb.ROLE_TEACHER, Role.STUDENT: pb.ROLE_STUDENT}
ROLE_FROM_WIRE = {wire: role for role, wire in ROLE_TO_WIRE.items()}
MODE_TO_WIRE = {Mode.LEARNING: pb.MODE_LEARNING, Mode.EXPERT: pb.MODE_EXPERT}
MODE_FROM_WIRE = {wire: mode for mode, wire in MODE_TO_WIRE.items()}
PHASE_TO_WIRE = {
    name.removeprefix("PHASE_").lower(): number for name, number in pb.Phase.items() if number
}
"""By name in lower case."""
PHASE_FROM_WIRE = {wire: name for name, wire in PHASE_TO_WIRE.items()}


def sums_to_wire(
    pairs: Mapping[Pair, PairSums],
    modes: Mapping[Pair, Mode] = MappingProxyType({}),
    in_force: InForce = NOTHING,
) -> list[pb.PairSums]:
    """Return one message per pair, in the same order.

    modes: those that this rank has chosen. in_force: what commands hold and scale.
    """
    messages = [
        pb.PairSums(teacher=p.teacher, student=p.student, gap=s.gap, e_s=s.e_s, e_t=s.e_t, n=s.n)
        for p, s in pairs.items()
    ]
    for message in messages if modes else ():
        mode = modes.get(_pair(message.teacher, message.student))
        message.mode = MODE_TO_WIRE[mode] if mode else pb.MODE_UNSPECIFIED
    for message in messages if in_force else ():
        pair = _pair(message.teacher, message.student)
        if mode := in_force.holds.get(pair):
            message.mode, message.held = MODE_TO_WIRE[mode], True
        message.delta_scale = in_force.scales.get(pair, 0.0)
    return messages


def sums_from_wire(report: pb.Report) -> dict[Pair, PairSums]:
    """Return the sums in a report by pair, in the same order."""
    return {_pair(m.teacher, m.student): PairSums(m.gap, m.e_s, m.e_t, m.n) for m in report.pairs}


NO_MODES: Mapping[Pair, Mode] = MappingProxyType({})


def modes_from_wire(report: pb.Report) -> tuple[Mapping[Pair, Mode], InForce]:
    """Return the modes that a rank has chosen, by pair, and what commands hold and scale.

    Nearly always nothing of both. Numbers are returned as they are: the coordinator checks them.
    """
    for m in report.pairs:
        if m.mode or m.delta_scale:
            break
    else:
        return NO_MODES, NOTHING
    modes: dict[Pair, Mode] = {}
    holds: dict[Pair, Mode] = {}
    scales: dict[Pair, float] = {}
    for m in report.pairs:
        pair = _pair(m.teacher, m.student)
        if mode := MODE_FROM_WIRE.get(m.mode):
            (holds if m.held else modes)[pair] = mode
        if m.delta_scale:
            scales[pair] = m.delta_scale
    return modes, InForce(holds, scales) if holds or scales else NOTHING


@lru_cache(maxsize=1024)
def _pair(teacher: str, student: str) -> Pair:
    """Return a pair; cached, because every step has the same few pairs."""
    return Pair(teacher, student)


def decision_to_wire(decision: Decision) -> pb.Decision:
    """Return the message of a decision, with all its numbers."""
    message = pb.Decision(
        step=decision.step,
        paused=decision.paused,
        pairs=[
            pb.PairDecision(
                teacher=p.pair.teacher,
                student=p.pair.student,
                gap=p.distances.gap,
                e_s=p.distances.e_s,
                e_t=p.distances.e_t,
                n=p.distances.n,
                epsilon=p.epsilon,
                delta=p.delta,
                mode=MODE_TO_WIRE[p.mode],
            )
            for p in decision.pairs
        ],
    )
    for place, p in enumerate(decision.pairs):
        if p.held or p.delta_scale != 1:
            message.pairs[place].held = p.held
            message.pairs[place].delta_scale = p.delta_scale if p.delta_scale != 1 else 0.0
    return message


def decision_from_wire(message: pb.Decision) -> Decision:
    """Return the decision in a message; its numbers are bit for bit those of the sender."""
    return Decision(
        step=message.step,
        paused=tuple(message.paused),
        pairs=tuple(
            PairDecision(
                pair=Pair(m.teacher, m.student),
                distances=Distances(m.gap, m.e_s, m.e_t, m.n),
                epsilon=m.epsilon,
                delta=m.delta,
                mode=MODE_FROM_WIRE[m.mode],
                held=m.held,
                delta_scale=m.delta_scale or 1.0,
            )
            for m in message.pairs
        ),
    )


def command_to_wire(command: Command) -> pb.Command:
    """Return the message of a command."""
    message = pb.Command(command_id=command.id, asked_by=command.asked_by)
    if command.action is Action.HOLD:
        mode = MODE_TO_WIRE[command.mode] if command.mode else pb.MODE_UNSPECIFIED
        hold = pb.Hold(teacher=command.teacher, mode=mode, until_step=command.until_step)
        message.hold.CopyFrom(hold)
    elif command.action is Action.RELEASE:
        message.release.CopyFrom(pb.Release(teacher=command.teacher))
    elif command.action is Action.SCALE:
        scale = pb.ScaleThreshold(teacher=command.teacher, factor=command.factor)
        message.scale_threshold.CopyFrom(scale)
    elif command.action is Action.CHECKPOINT:
        message.save_checkpoint.SetInParent()
    else:
        message.stop.SetInParent()
    return message


def command_from_wire(message: pb.Command) -> Command:
    """Return the command in a message; ValueError if it has no action that this version knows."""
    command = partial(Command, message.command_id, asked_by=message.asked_by)
    kind = message.WhichOneof("action")
    if kind == "hold":
        hold = message.hold
        mode = MODE_FROM_WIRE.get(hold.mode)
        return command(Action.HOLD, hold.teacher, mode, hold.until_step)
    if kind == "release":
        return command(Action.RELEASE, message.release.teacher)
    if kind == "scale_threshold":
        scale = message.scale_threshold
        return command(Action.SCALE, scale.teacher, factor=scale.factor)
    if kind == "save_checkpoint":
        return command(Action.CHECKPOINT)
    if kind == "stop":
        return command(Action.STOP)
    raise ValueError("a command without an action that this version knows")


def taken_to_wire(stamped: Stamped) -> pb.CommandTaken:
    """Return the message with which rank 0 answers a command."""
    return pb.CommandTaken(
        command_id=stamped.command.id,
        first_step=stamped.first_step,
        failure=stamped.failure,
        command=command_to_wire(stamped.command),
    )
