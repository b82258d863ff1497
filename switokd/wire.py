"""Converts sums and decisions between wire messages and dataclasses.

Only the client and the coordinator use it; all other code knows only the dataclasses.

Not covered: messages that only one side converts (`coordination/client.py`,
`services/coordinator/messages.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from switokd.distillation.decision import Decision, Mode, PairDecision
from switokd.distillation.gap import Distances, PairSums
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
    pairs: Mapping[Pair, PairSums], modes: Mapping[Pair, Mode] = MappingProxyType({})
) -> list[pb.PairSums]:
    """Return one message per pair, in the same order. modes: those that hold in any case."""
    messages = [
        pb.PairSums(teacher=p.teacher, student=p.student, gap=s.gap, e_s=s.e_s, e_t=s.e_t, n=s.n)
        for p, s in pairs.items()
    ]
    for message in messages if modes else ():
        mode = modes.get(_pair(message.teacher, message.student))
        message.mode = MODE_TO_WIRE[mode] if mode else pb.MODE_UNSPECIFIED
    return messages


def sums_from_wire(report: pb.Report) -> dict[Pair, PairSums]:
    """Return the sums in a report by pair, in the same order."""
    return {_pair(m.teacher, m.student): PairSums(m.gap, m.e_s, m.e_t, m.n) for m in report.pairs}


def modes_from_wire(report: pb.Report) -> dict[Pair, Mode]:
    """Return the modes in a report, by pair; nearly always none."""
    return {
        _pair(m.teacher, m.student): MODE_FROM_WIRE[m.mode]
        for m in report.pairs
        if m.mode in MODE_FROM_WIRE
    }


@lru_cache(maxsize=1024)
def _pair(teacher: str, student: str) -> Pair:
    """Return a pair; cached, because every step has the same few pairs."""
    return Pair(teacher, student)


def decision_to_wire(decision: Decision) -> pb.Decision:
    """Return the message of a decision, with all its numbers."""
    return pb.Decision(
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
            )
            for m in message.pairs
        ),
    )
