"""Overhead of a step: the wait for the decision, and the exchange.

Two teachers and a student have one rank each and wait 20 ms instead of computing (`simulated.py`).
The cores are therefore free for everything else, as if a GPU computed. Processes, collectives and
the coordinator are real.

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
    """A strategy to measure with."""

    suffix: str
    """Suffix of the names of its figures."""
    distillation: Mapping[str, Any]
    target: bool
    """Whether the figures have targets and are compared with bare calls."""


LEARNING = Case("", {"strategy": "switokd"}, True)
PAUSING = Case("_while_pausing", {"strategy": "threshold", "strategy_kwargs": {"delta": 0}}, False)
"""Waiting networks learn nothing, so that with switokd no teacher gets ahead and pauses.

With a threshold of 0 a teacher pauses when it is better than the student: about every second step.
"""

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
    """Yield the figures of waiting and of the exchange."""
    for case in (LEARNING, PAUSING):
        yield from _measure(case, quick, say)
    yield _exchange(quick, say)


def _measure(case: Case, quick: bool, say: Say) -> Iterable[Figure]:
    rounds = 1 if quick else 5
    results, bare, paced, gathers = [], [], [], []
    for i in range(rounds):
        say(f"waits for decisions, {case.distillation['strategy']}, round {i + 1} of {rounds}")
        config = run_file(2 if quick else 10, case.distillation)
        results.append(ranks.train(config, len(NETWORKS)))
        trips = 20 if quick else 100
        bare.append(round_trip(3 * trips))
        paced.append(round_trip(trips, FORWARD + BACKWARD))
        if case.target:
            ((_, gather),), _ = collectives.exchange(len(NETWORKS), "cpu", 1)
            gathers.append(gather)
    waits = [r.summary["waiting"]["decision_mean_seconds"] for r in results]
    steps = [r.step_seconds for r in results]
    details = {
        "step_seconds": steps,
        "decision_p99_seconds": [r.summary["waiting"]["decision_p99_seconds"] for r in results],
        "round_trip_seconds_between_steps_of_20_ms": paced,
        "bare_all_gather_seconds": gathers,
        "paused": [r.paused for r in results],
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
        what="a whole step over its 20 ms of compute; below 1 if all teachers pause",
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
            what="a step's overhead over a bare all_gather and a round trip",
            simulation=True,
            details=details,
        )


def run_file(epochs: int, distillation: Mapping[str, Any]) -> dict[str, Any]:
    """Run file of three networks that take 20 ms per step."""
    kwargs = {
        "seconds_per_sample_forward": FORWARD / BATCH,
        "seconds_per_sample_backward": BACKWARD / BATCH,
    }
    return {
        "name": "bench",
        "device": "cpu",
        "data": {"dataset": "digits", "batch_size": BATCH},
        "networks": {
            name: {
                "role": role,
                "model": "bench.simulated:SimulatedNetwork",
                "model_kwargs": kwargs,
            }
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
