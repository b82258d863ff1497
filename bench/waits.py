"""What a step costs beside its compute: the wait for the decision, and the exchange. A simulation.

Two teachers and a student, a rank each, whose compute is a wait of 20 ms (`simulated.py`), so that
what is left of the cores is free for the rest, as it is where a GPU computes. Processes,
collectives and the coordinator are real.

Not covered: several machines; networks that compute on the coordinator's core.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench import collectives, ranks
from bench.echo import round_trip
from bench.figures import Figure, Say

FORWARD, BACKWARD, BATCH = 7e-3, 13e-3, 64
NETWORKS = {"t1": "teacher", "t2": "teacher", "s": "student"}


@dataclass(frozen=True)
class Case:
    """A way of deciding, by the suffix of its figures' names."""

    suffix: str
    distillation: Mapping[str, Any]
    target: bool
    """Whether it is held against what is to be reached, and against bare calls."""


LEARNING = Case("", {"strategy": "switokd"}, True)
PAUSING = Case("_while_pausing", {"strategy": "threshold", "strategy_kwargs": {"delta": 0}}, False)
"""Networks that only wait learn nothing, so that under switokd nobody gets ahead; with a threshold
of 0 a teacher pauses whenever it is the better one, which is about every second step."""

FIGURES = (
    *(
        f"{name}{case.suffix}"
        for case in (LEARNING, PAUSING)
        for name in ("decision_wait_share", "decision_wait_over_round_trip", "step_over_compute")
    ),
    "overhead_over_bare",
    "exchange_over_all_gather",
)


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give the figures of waiting."""
    for case in (LEARNING, PAUSING):
        yield from _measure(case, quick, say)
    yield _exchange(quick, say)


def _measure(case: Case, quick: bool, say: Say) -> Iterable[Figure]:
    rounds = 1 if quick else 5
    records, bare, paced, gathers = [], [], [], []
    for i in range(rounds):
        say(f"waits for decisions, {case.distillation['strategy']}, round {i + 1} of {rounds}")
        config = run_file(3 if quick else 10, case.distillation)
        records.append(ranks.train(config, len(NETWORKS)))
        bare.append(round_trip(300))
        paced.append(round_trip(100, FORWARD + BACKWARD))
        if case.target:
            ((_, gather),), _ = collectives.exchange(len(NETWORKS), "cpu", 1)
            gathers.append(gather)
    waits = [r.summary["waiting"]["decision_mean_seconds"] for r in records]
    steps = [r.step_seconds for r in records]
    details = {
        "step_seconds": steps,
        "decision_p99_seconds": [r.summary["waiting"]["decision_p99_seconds"] for r in records],
        "round_trip_seconds_between_steps_of_20_ms": paced,
        "bare_all_gather_seconds": gathers,
        "paused": [r.paused for r in records],
    }
    yield Figure.of_pairs(
        f"decision_wait_share{case.suffix}",
        list(zip(waits, steps, strict=True)),
        target=0.02 if case.target else None,
        at_least=False,
        what="a teacher's wait for the decision over the step, steps of 20 ms",
        simulation=True,
        details=details,
    )
    yield Figure.of_pairs(
        f"decision_wait_over_round_trip{case.suffix}",
        list(zip(waits, bare, strict=True)),
        target=1.5 if case.target else None,
        at_least=False,
        what="a teacher's wait for the decision over a bare gRPC stream's round trip",
        simulation=True,
        details=details,
    )
    yield Figure.of_pairs(
        f"step_over_compute{case.suffix}",
        [(step, FORWARD + BACKWARD) for step in steps],
        what="a step of 20 ms compute, all included; below 1 where all teachers pause",
        simulation=True,
        details=details,
    )
    if case.target:
        yield Figure.of_pairs(
            "overhead_over_bare",
            [
                (step - FORWARD - BACKWARD, gather + trip)
                for step, gather, trip in zip(steps, gathers, bare, strict=True)
            ],
            what="what a step takes beside its compute, over a bare all_gather and a round trip",
            simulation=True,
            details=details,
        )


def run_file(epochs: int, distillation: Mapping[str, Any]) -> dict[str, Any]:
    """Give the run file of three networks of 20 ms per step."""
    kwargs = {
        "seconds_per_sample_forward": FORWARD / BATCH,
        "seconds_per_sample_backward": BACKWARD / BATCH,
    }
    return {
        "name": "bench",
        "device": "cpu",
        "data": {"dataset": "digits", "batch_size": BATCH},
        "networks": {
            name: {"role": role, "model": "bench.simulated:Waiting", "model_kwargs": kwargs}
            for name, role in NETWORKS.items()
        },
        "distillation": dict(distillation),
        "schedule": {"epochs": epochs},
    }


def _exchange(quick: bool, say: Say) -> Figure:
    say("the exchange against a bare all_gather")
    pairs, links = collectives.exchange(len(NETWORKS), "cpu", 1 if quick else 7)
    return Figure.of_pairs(
        "exchange_over_all_gather",
        pairs,
        what="logits and labels of 64 samples, 100 classes, 3 ranks, checked and on the host",
        details={"links": links},
    )
