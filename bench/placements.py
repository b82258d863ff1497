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
from dataclasses import replace
from statistics import median

from bench.devices import (
    PER_DEVICE,
    SECONDS_PER_SAMPLE,
    Devices,
    Measured,
    Simulation,
    operations,
)
from bench.figures import Figure, Say
from switokd.runtime.placement import Placement, dedicated, replicated

FIGURES = (
    *(f"simulated_efficiency{s}" for s in ("", "_replicated", "_unslowed", "_with_gradients")),
    *(f"plan_error{s}" for s in ("", "_unslowed", "_with_gradients")),
    "simulated_strong_scaling",
    "simulated_weak_scaling",
)
FAST = Devices()
UNSLOWED = Devices(2 * SECONDS_PER_SAMPLE, is_slowed=False)
WITH_GRADIENTS = Devices(5 * SECONDS_PER_SAMPLE, gradients=True)
QUICK = 4
"""How many times faster devices are where figures are not to be kept."""


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give simulated_efficiency, plan_error, their siblings, and the scaling tables."""
    count, rounds, steps = (3, 1, 2) if quick else (8, 3, 8)
    batch = PER_DEVICE * count

    def simulation(devices: Devices, steps: int) -> Simulation:
        say("profiling simulated networks")
        if quick:
            seconds = devices.seconds_per_sample / QUICK
            devices = replace(devices, seconds_per_sample=seconds, images=4 * batch)
        return Simulation(devices, steps, batch)

    def run(on: Simulation, placement: Placement, batch: int = batch) -> Measured:
        say(f"simulation: {placement}")
        return on.run(placement, batch)

    def planned(on: Simulation, devices: int, batch: int = batch) -> Measured:
        return run(on, on.planned(devices, batch), batch)

    fast = simulation(FAST, steps)
    topology = fast.config.topology
    best = [planned(fast, count) for _ in range(rounds)]
    yield _efficiency("", best)
    everywhere = [run(fast, replicated(topology, count)) for _ in range(rounds)]
    yield _efficiency("_replicated", everywhere)
    others, strong, weak = [*everywhere], [best[0]], [best[0]]
    if not quick:
        largest, *small = topology
        shares = {largest: 6, **dict.fromkeys(small, 1)}, dict.fromkeys(topology, 1)
        others += [run(fast, dedicated(topology, each)) for each in shares]
        strong += [planned(fast, n) for n in (1, 2, 3, 4, 16)]
        weak += [planned(fast, n, PER_DEVICE * n) for n in (1, 2, 4, 16)]
    yield _plan_error("", best, [*others, *strong, *weak])
    yield _scaling("simulated_strong_scaling", strong, f"a batch of {batch}")
    yield _scaling("simulated_weak_scaling", weak, f"{PER_DEVICE} images per device")
    for suffix, devices in (("_unslowed", UNSLOWED), ("_with_gradients", WITH_GRADIENTS)):
        other = simulation(devices, 2 if quick else 5)
        found = [planned(other, count) for _ in range(rounds)]
        yield _efficiency(suffix, found)
        yield _plan_error(suffix, found, [])


def _efficiency(suffix: str, best: list[Measured]) -> Figure:
    placement = "replicated" if suffix == "_replicated" else "the planner's placement"
    return Figure.of_pairs(
        f"simulated_efficiency{suffix}",
        [(each.ideal_seconds, each.step_seconds) for each in best],
        target=None if suffix else 0.9,
        what=f"ideal step over measured step, {best[0].devices} simulated devices, {placement}",
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
        what=f"|predicted - measured| / measured, {best[0].devices} simulated devices, "
        "the planner's placement",
        simulation=True,
        details={
            "worst_of_all": max(each.plan_error for each in [*best, *others]),
            "median_of_all": median(each.plan_error for each in [*best, *others]),
            "runs": [each.record() for each in [*best, *others]],
        },
    )


def _scaling(name: str, runs: list[Measured], what: str) -> Figure:
    runs = sorted(runs, key=lambda each: each.devices)
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
