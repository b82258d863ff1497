"""A run as GetRunStatus, WatchRun and ListRuns show it.

Not covered: runs that only the journal has (`finished.py`); who may ask (`servicer.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from switokd.distillation.decision import Mode
from switokd.services.coordinator.messages import (
    STATE_TO_WIRE,
    plan_to_wire,
    rank_to_wire,
    status_to_wire,
)
from switokd.services.coordinator.run import CoordinatedRun
from switokd.services.coordinator.run_metrics import RunMetrics
from switokd.v1 import coordinator_pb2 as pb

RANKS_AT_ONCE = 50
"""Ranks that are described at once: about a quarter of a millisecond."""


@dataclass
class RunTimes:
    """When a run was first started, and when it ended, in seconds since 1970; 0: not known."""

    started: float
    ended: float = 0.0


def run_to_wire(
    run: CoordinatedRun, metrics: RunMetrics, times: RunTimes, recorded: int
) -> pb.GetRunStatusResponse:
    """Describe a run, without its ranks. recorded: last step in the journal on the disk."""
    status = status_to_wire(run, recorded)
    status.started_at, status.ended_at = times.started, times.ended
    measured = metrics.measured
    status.training_epoch = measured.training_epoch or 0
    status.planned_epochs = measured.planned_epochs or 0
    status.planned_steps = measured.planned_steps or 0
    status.pairs.extend(_pairs(metrics))
    status.networks.extend(_networks(run, metrics))
    return status


def ranks_to_wire(run: CoordinatedRun) -> Iterator[list[pb.RankStatus]]:
    """Yield the ranks that have sent a heartbeat, `RANKS_AT_ONCE` at a time."""
    reported, states = run.reported, run.health.ranks
    furthest = max(reported.values(), default=0)
    for start in range(0, len(states), RANKS_AT_ONCE):
        yield [
            rank_to_wire(state, run.plan, furthest - reported[state.rank])
            for state in states[start : start + RANKS_AT_ONCE]
        ]


def summary_to_wire(run: CoordinatedRun, times: RunTimes) -> pb.RunSummary:
    """Describe a run for ListRuns."""
    return pb.RunSummary(
        run_id=run.run_id,
        state=STATE_TO_WIRE[run.state],
        networks=plan_to_wire(run.plan).networks,
        ranks=run.world_size,
        connected_ranks=len(run.connected),
        last_step=run.last_step,
        epoch=run.epoch,
        started_at=times.started,
        ended_at=times.ended,
        failure=run.failure,
    )


def _pairs(metrics: RunMetrics) -> Iterator[pb.PairStatus]:
    for pair, counted in metrics.pairs.items():
        steps = sum(counted.steps.values())
        yield pb.PairStatus(
            teacher=pair.teacher,
            student=pair.student,
            expert_ratio=counted.steps[Mode.EXPERT] / steps if steps else 0.0,
            switches=counted.switches,
        )


def _networks(run: CoordinatedRun, metrics: RunMetrics) -> Iterator[pb.NetworkStatus]:
    for name in run.plan.topology:
        series = metrics.networks.get(name)
        if series is None:
            yield pb.NetworkStatus(name=name)
            continue
        yield pb.NetworkStatus(
            name=name,
            paused_ratio=(series.paused or 0) / metrics.steps if metrics.steps else 0.0,
            samples=series.samples or 0,
            loss=series.loss,
            accuracy=series.train_accuracy,
            test_accuracy=series.test_accuracy,
        )
