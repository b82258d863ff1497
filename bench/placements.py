"""Placements on simulated devices: how well more devices are used, and what the planner foresees.

    efficiency = (seconds of all work on one device / devices) / measured step

Devices are those of `devices.py`. In most figures they compute 5 TFLOP/s and gradients are next to
nothing, as if links were infinitely fast. Beside them

* `_unslowed`: without simulated time being slowed down, on devices half as fast. What two cores do
  for eight ranks beside their compute weighs as much as it does on such a machine;
* `_with_gradients`: gradients are as large as the networks' own, and travel over this machine's
  loopback, which is measured for the planner by as many ranks at once; devices compute 1 TFLOP/s.

Not covered: real devices (all of this is a simulation); pauses; fast links.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from bench.devices import (
    BATCH,
    PER_DEVICE,
    SECONDS_PER_SAMPLE,
    Devices,
    Measured,
    Simulation,
    operations,
)
from bench.figures import Figure, Say
from switokd.placement import Placement, dedicated, replicated

FIGURES = (
    *(f"simulated_efficiency{s}" for s in ("", "_replicated", "_unslowed", "_with_gradients")),
    *(f"plan_error{s}" for s in ("", "_unslowed", "_with_gradients")),
    "simulated_strong_scaling",
    "simulated_weak_scaling",
)
FAST = Devices()
UNSLOWED = Devices(2 * SECONDS_PER_SAMPLE, is_slowed=False)
WITH_GRADIENTS = Devices(5 * SECONDS_PER_SAMPLE, gradients=True)


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give simulated_efficiency, plan_error, their siblings, and the scaling tables."""
    rounds = 2 if quick else 3
    say("profiling simulated networks")
    fast = Simulation(FAST, steps=4 if quick else 8)
    topology = fast.config.topology

    def run(placement: Placement, batch: int = BATCH, simulation: Simulation = fast) -> Measured:
        say(f"simulation: {placement}")
        return simulation.run(placement, batch)

    def planned(devices: int, batch: int = BATCH, simulation: Simulation = fast) -> Measured:
        return run(simulation.planned(devices, batch), batch, simulation)

    best = [planned(8) for _ in range(rounds)]
    yield _efficiency("", best)
    everywhere = [run(replicated(topology, 8)) for _ in range(1 if quick else rounds)]
    yield _efficiency("_replicated", everywhere)
    largest, *small = topology
    others = [
        *everywhere,
        run(dedicated(topology, {largest: 6, **dict.fromkeys(small, 1)})),
        *([] if quick else [run(dedicated(topology, dict.fromkeys(topology, 1)))]),
    ]
    strong = [planned(n) for n in ((4,) if quick else (1, 2, 3, 4, 16))]
    strong = sorted([*strong, best[0]], key=lambda m: m.devices)
    weak = [] if quick else [planned(n, PER_DEVICE * n) for n in (1, 2, 4, 16)]
    weak = sorted([*weak, best[0]], key=lambda m: m.devices)
    yield _plan_error("", best, [*others, *strong, *weak])
    yield _scaling("simulated_strong_scaling", strong, "a batch of 256")
    yield _scaling("simulated_weak_scaling", weak, "32 images per device")
    for suffix, devices in (("_unslowed", UNSLOWED), ("_with_gradients", WITH_GRADIENTS)):
        simulation = Simulation(devices, steps=2 if quick else 5)
        found = [planned(8, simulation=simulation) for _ in range(1 if quick else rounds)]
        yield _efficiency(suffix, found)
        yield _plan_error(suffix, found, [])


def _efficiency(suffix: str, best: list[Measured]) -> Figure:
    placement = "replicated" if suffix == "_replicated" else "the planner's placement"
    return Figure.of_pairs(
        f"simulated_efficiency{suffix}",
        [(each.ideal_seconds, each.step_seconds) for each in best],
        target=None if suffix else 0.9,
        what=f"ideal step over measured step, 8 simulated devices, {placement}",
        simulation=True,
        details={
            "placement": best[0].placement,
            "work_shares": operations(),
            "time_slowed_by": best[0].slowed,
        },
    )


def _plan_error(suffix: str, best: list[Measured], others: list[Measured]) -> Figure:
    return Figure(
        f"plan_error{suffix}",
        tuple(each.plan_error for each in best),
        tuple((each.predicted_seconds, each.step_seconds) for each in best),
        target=None if suffix == "_unslowed" else 0.15,
        at_least=False,
        what="|predicted - measured| / measured, 8 simulated devices, the planner's placement",
        simulation=True,
        details={
            "worst_of_all": max(each.plan_error for each in [*best, *others]),
            "median_of_all": median(each.plan_error for each in [*best, *others]),
            "runs": [each.record() for each in [*best, *others]],
        },
    )


def _scaling(name: str, runs: list[Measured], what: str) -> Figure:
    return Figure(
        name,
        (runs[-1].efficiency,),
        what=f"efficiency on {runs[-1].devices} simulated devices, {what}",
        simulation=True,
        details={
            "rows": [
                {
                    "devices": each.devices,
                    "batch": each.batch,
                    "step_seconds": each.step_seconds / each.slowed,
                    "images_per_second": each.slowed * each.batch / each.step_seconds,
                    "efficiency": each.efficiency,
                    "placement": each.placement,
                }
                for each in runs
            ]
        },
    )
