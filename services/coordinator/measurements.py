"""What ranks measure and send for the metrics, checked: it decides nothing, and may be wrong.

A number that is not finite, or outside of what is possible, counts as not sent: the metrics of a
rank in trouble must not end its run. A name that the run does not have is refused, because it would
be a label.

Not covered: what ranks report for the decisions (`report_checks.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.text import clean
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import PHASE_FROM_WIRE

MOST = 2.0**53
"""The largest count, size or number of seconds; a larger one is a mistake."""
MOST_HOST_LETTERS = 64
"""Longest name of a machine in Linux."""
TERM_FROM_WIRE = {
    pb.LossTerm.KIND_TASK: "task",
    pb.LossTerm.KIND_PEER: "distillation",
    pb.LossTerm.KIND_COMBINED: "combined",
}


@dataclass(frozen=True)
class Measured:
    """A rank's progress on one of its networks; None for what it has not sent."""

    samples: int = 0
    """Since the last progress, as all counts and seconds."""
    loss: float | None = None
    accuracy: float | None = None
    """From 0 to 1."""
    test_accuracy: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    loss_terms: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """By kind of the term and peer."""
    training_seconds: float = 0.0
    learning_seconds: float = 0.0
    learned_steps: int = 0
    paused_steps: int = 0


@dataclass(frozen=True)
class RunMeasured:
    """What rank 0 says of the run: since its process began, and for the whole run."""

    training_epoch: int | None = None
    """Counted from 1; None: not sent."""
    skipped_steps: int = 0
    checkpoints: int = 0
    planned_steps: int | None = None
    """Steps of the whole training; None: not sent."""
    planned_epochs: int | None = None
    """Epochs of the whole training; None: not sent."""


@dataclass(frozen=True)
class Used:
    """What a rank's process has used; None for what it has not sent."""

    phases: Mapping[str, float]
    """By phase: seconds since the process began."""
    memory: int | None = None
    """Bytes."""
    gpu_memory: int | None = None
    """Bytes."""
    disk_free: int | None = None
    """Bytes that are free where the run folder is."""


def network_of(message: pb.Progress, plan: Plan, rank: int) -> str:
    """Return the network that a progress is of; Refusal if the run does not have it.

    Rank 0 sends the test accuracy of all networks.
    """
    network = message.network or plan.networks_of[rank][0]
    _check_network(network, plan, rank)
    return network


def measured_from_wire(message: pb.Progress, plan: Plan, rank: int) -> Measured:
    """Return a rank's progress; Refusal if it names a network that the run does not have."""

    def optional(name: str, least: float = 0.0, most: float = MOST) -> float | None:
        number = getattr(message, name)
        return number if message.HasField(name) and least <= number <= most else None  # type: ignore[arg-type]

    return Measured(
        _count(message.samples),
        optional("loss", -MOST),
        optional("accuracy", most=1.0),
        optional("test_accuracy", most=1.0),
        optional("learning_rate"),
        optional("gradient_norm", most=math.nextafter(math.inf, 0.0)),
        _loss_terms(message, plan, rank) if message.loss_terms else {},
        _seconds(message.training_seconds),
        _seconds(message.learning_seconds),
        _count(message.learned_steps),
        _count(message.paused_steps),
    )


def run_measured_from_wire(message: pb.RunProgress) -> RunMeasured:
    """Return what rank 0 says of the run."""
    return RunMeasured(
        _count(message.training_epoch) or None,
        _count(message.skipped_steps),
        _count(message.checkpoints),
        _count(message.planned_steps) or None,
        _count(message.planned_epochs) or None,
    )


def used_from_wire(message: pb.Usage) -> Used:
    """Return what a rank's process has used; phases that this version does not know are dropped."""
    phases: dict[str, float] = {}
    for part in message.phases:
        if name := PHASE_FROM_WIRE.get(part.phase):
            phases[name] = _seconds(part.seconds)
    return Used(
        phases,
        _count(message.memory_bytes) or None,
        _count(message.gpu_memory_bytes) if message.HasField("gpu_memory_bytes") else None,
        _count(message.disk_free_bytes) if message.HasField("disk_free_bytes") else None,
    )


def host_of(message: pb.Attach) -> str:
    """Return the name of a rank's machine, cut and cleaned."""
    return clean(message.host[:MOST_HOST_LETTERS])


def _loss_terms(message: pb.Progress, plan: Plan, rank: int) -> dict[tuple[str, str], float]:
    terms: dict[tuple[str, str], float] = {}
    for term in message.loss_terms:
        if (kind := TERM_FROM_WIRE.get(term.kind)) is None or not abs(term.value) <= MOST:
            continue
        peer = term.peer if term.kind == pb.LossTerm.KIND_PEER else ""
        if term.kind == pb.LossTerm.KIND_PEER:
            _check_network(peer, plan, rank)
        terms[kind, peer] = terms.get((kind, peer), 0.0) + term.value
    return terms


def _check_network(network: str, plan: Plan, rank: int) -> None:
    if network not in plan.topology:
        raise Refusal(
            Refusal.Kind.INVALID_ARGUMENT,
            f"{plan.describe(rank)} sends the progress of {network[:99]!r}, which the run does "
            "not have",
        )


def _count(number: int) -> int:
    """Return a count, or 0 if it is impossible."""
    return number if 0 <= number <= MOST else 0


def _seconds(number: float) -> float:
    """Return seconds, or 0 if they are impossible."""
    return number if 0 <= number <= MOST else 0.0
