"""The series of one run: what a scrape makes of what is counted of it.

A scrape runs on a thread of its own. Lists are copies, because the event loop may add an entry.

Not covered: which runs are shown (`metrics.py`); the counting (`run_metrics.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from switokd.distillation.decision import Mode
from switokd.distillation.overrides import Action
from switokd.services.coordinator import reasons
from switokd.services.coordinator.histogram import Histogram
from switokd.services.coordinator.run import RunState
from switokd.services.coordinator.run_metrics import NetworkSeries, RunMetrics

Series = tuple[str, tuple[str, ...], float | Histogram | None]
"""Name of the family, values of its labels, value; a series whose value is None is left out."""

LABELS = {
    **{reason: reason for reason in reasons.REASONS},
    **dict.fromkeys((reasons.HELD_LEARNING, reasons.HELD_PAUSED), "held"),
    **dict.fromkeys((reasons.STRATEGY_LEARNING, reasons.STRATEGY_PAUSED), "other"),
}
"""By reason: the label `reason`. Whether the teacher is paused is a series of its own."""
REASONS = tuple(dict.fromkeys(LABELS.values()))
MOST_LETTERS = 200
"""Longest list of networks in a label."""


def series_of(metrics: RunMetrics) -> Iterator[Series]:
    """Return all series of one run, those of its ranks last."""
    yield from _of_run(metrics)
    yield from _of_pairs(metrics)
    yield from _of_teachers(metrics)
    for name, network in list(metrics.networks.items()):
        yield from _of_network((metrics.run.run_id, name), network)
    yield from _of_ranks(metrics)


def _of_run(metrics: RunMetrics) -> Iterator[Series]:
    run, plan, of_run = metrics.run, metrics.run.plan, (metrics.run.run_id,)
    students = [name for name in plan.topology if name not in plan.teachers]
    names = _joined(plan.teachers), _joined(students)
    yield "run_info", (*of_run, plan.strategy, plan.semantics, *names), 1
    for state in RunState:
        yield "run_state", (*of_run, state.value), state is run.state
    yield "run_attempt", of_run, run.epoch
    yield "run_epoch", of_run, metrics.measured.training_epoch
    yield "run_planned_epochs", of_run, metrics.measured.planned_epochs
    yield "run_planned_steps", of_run, metrics.measured.planned_steps
    yield "run_started_timestamp_seconds", of_run, metrics.started or None
    yield "last_decision_timestamp_seconds", of_run, metrics.last_decision_at or None
    yield "connected_ranks", of_run, len(run.connected)
    yield "expected_ranks", of_run, run.world_size
    yield "steps", of_run, metrics.steps or None  # a run that begins makes no progress yet
    yield "decided_alone_steps", of_run, run.decided_alone
    yield "skipped_steps", of_run, metrics.measured.skipped_steps
    yield "checkpoints", of_run, metrics.measured.checkpoints
    for action in Action:
        yield "commands", (*of_run, action.value), metrics.commands[action]
    if metrics.steps:
        yield "round_duration_seconds", of_run, metrics.round_duration


def _of_pairs(metrics: RunMetrics) -> Iterator[Series]:
    now = metrics.decided_at  # before the pairs' clocks, so that no time is counted back
    for pair, counted in list(metrics.pairs.items()):
        labels = (metrics.run.run_id, pair.teacher, pair.student)
        last, clock = counted.last, counted.clock
        yield "gap", labels, last.distances.gap
        yield "threshold", labels, last.delta
        yield "margin", labels, last.distances.gap - last.delta
        yield "epsilon", labels, last.epsilon
        yield "e_s", labels, last.distances.e_s
        yield "e_t", labels, last.distances.e_t
        yield "learning_mode", labels, last.mode is Mode.LEARNING
        yield "switches", labels, counted.switches
        for mode in Mode:
            yield "pair_steps", (*labels, mode.value), counted.steps[mode]
            yield "mode_seconds", (*labels, mode.value), clock.seconds(mode, now)


def _of_teachers(metrics: RunMetrics) -> Iterator[Series]:
    if (decision := metrics.last) is None:
        return
    teachers = tuple(metrics.run.plan.teachers)
    for teacher, reason in zip(teachers, reasons.reasons(decision, teachers), strict=True):
        labels = (metrics.run.run_id, teacher)
        yield "teacher_paused", labels, teacher in decision.paused
        for each in REASONS:
            yield "teacher_reason", (*labels, each), each == LABELS[reason]
        if (network := metrics.networks.get(teacher)) and network.paused is not None:
            yield "paused_steps", labels, network.paused
            yield "paused_ratio", labels, network.paused / metrics.steps


def _of_network(labels: tuple[str, str], network: NetworkSeries) -> Iterator[Series]:
    yield "loss", labels, network.loss
    for (kind, peer), value in list(network.loss_terms.items()):
        yield "loss_term", (*labels, kind, peer), value
    yield "learning_rate", labels, network.learning_rate
    yield "gradient_norm", labels, network.gradient_norm
    yield "train_accuracy_ratio", labels, network.train_accuracy
    yield "test_accuracy_ratio", labels, network.test_accuracy
    yield "samples", labels, network.samples
    yield "compute_saved_ratio", labels, network.compute_saved_ratio
    yield "decision_wait_seconds", labels, network.decision_wait


def _of_ranks(metrics: RunMetrics) -> Iterator[Series]:
    run = metrics.run
    if run.ended_at is None:
        for number, rank in list(metrics.ranks.items()):
            labels = (run.run_id, str(number))
            networks = _joined(run.plan.networks_of.get(number, ()))
            yield "rank_info", (*labels, rank.host, networks), 1
            yield "rank_reconnects", labels, rank.reconnects
    for number, rank in list(metrics.ranks.items()):
        if any(rank.exchange.counts):
            yield "exchange_seconds", (run.run_id, str(number)), rank.exchange
    states = run.health.ranks
    reported = run.reported if states else {}
    furthest = max(reported.values(), default=0)
    for health in states:
        labels = (run.run_id, str(health.rank))
        step = reported.get(health.rank, 0)
        yield "rank_step", labels, step
        yield "rank_lag_steps", labels, furthest - step
        yield "rank_phase_seconds", (*labels, health.heartbeat.phase), health.phase_seconds
        yield "heartbeat_age_seconds", labels, health.age
        yield "rank_waited_for", labels, health.is_waited_for
        found = metrics.ranks.get(health.rank)
        if found is not None and (used := found.used) is not None:
            for phase, seconds in used.phases.items():
                yield "phase_seconds", (*labels, phase), seconds
            yield "rank_memory_bytes", labels, used.memory
            yield "rank_gpu_memory_bytes", labels, used.gpu_memory
            yield "rank_disk_free_bytes", labels, used.disk_free


def _joined(names: list[str] | tuple[str, ...]) -> str:
    """Return names with commas between them, cut to `MOST_LETTERS`."""
    text = ",".join(names)
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 3] + "..."
