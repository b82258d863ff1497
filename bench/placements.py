"""Placements on simulated devices: efficiency with more devices, and error of the planner.

    efficiency = (seconds of all work on one device / devices) / seconds of a measured step

The devices come from `devices.py`. In most figures they compute 5 TFLOP/s, and gradients are almost
empty, as if links were infinitely fast. Two kinds of figures differ:

* `_unslowed`: simulated time is not slowed down, and devices are half as fast. The
  other work of eight ranks on two cores counts in full;
* `_with_gradients`: gradients have the size of the real networks' gradients and use this machine's
  loopback. The planner gets the measured link speed. Devices compute 1 TFLOP/s.

Not covered: real devices (everything here is simulated); pauses; fast links.
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
"""Factor by which devices are faster with --quick."""


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield the efficiencies, the errors of the planner, and the scaling tables."""
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
    on_all = [run(fast, replicated(topology, count)) for _ in range(rounds)]
    yield _efficiency("_replicated", on_all)
    others, strong, weak = [*on_all], [best[0]], [best[0]]
    if not quick:
        largest, *small = topology
        shares = {largest: 6, **dict.fromkeys(small, 1)}, dict.fromkeys(topology, 1)
        others += [run(fast, dedicated(topology, share)) for share in shares]
        strong += [planned(fast, n) for n in (1, 2, 3, 4, 16)]
        weak += [planned(fast, n, PER_DEVICE * n) for n in (1, 2, 4, 16)]
    yield _plan_error("", best, [*others, *strong, *weak])
    yield _scaling("simulated_strong_scaling", strong, f"a batch of {batch}")
    yield _scaling("simulated_weak_scaling", weak, f"{PER_DEVICE} images per device")
    for suffix, devices in (("_unslowed", UNSLOWED), ("_with_gradients", WITH_GRADIENTS)):
        other = simulation(devices, 2 if quick else 5)
        runs = [planned(other, count) for _ in range(rounds)]
        yield _efficiency(suffix, runs)
        yield _plan_error(suffix, runs, [])


def _efficiency(suffix: str, best: list[Measured]) -> Figure:
    placement = "replicated" if suffix == "_replicated" else "the planner's placement"
    return Figure.of_pairs(
        f"simulated_efficiency{suffix}",
        [(run.ideal_seconds, run.step_seconds) for run in best],
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
    runs = [*best, *others]
    return Figure(
        f"plan_error{suffix}",
        tuple(run.plan_error for run in best),
        tuple((run.predicted_seconds, run.step_seconds) for run in best),
        target=None if suffix == "_unslowed" else 0.15,
        at_least=False,
        what=f"|predicted - measured| / measured, {best[0].devices} simulated devices, "
        "the planner's placement",
        simulation=True,
        details={
            "worst_of_all": max(run.plan_error for run in runs),
            "median_of_all": median(run.plan_error for run in runs),
            "runs": [run.to_json() for run in runs],
        },
    )


def _scaling(name: str, runs: list[Measured], what: str) -> Figure:
    runs = sorted(runs, key=lambda run: run.devices)
    return Figure(
        name,
        (runs[-1].efficiency,),
        what=f"efficiency on {runs[-1].devices} simulated devices, {what}",
        simulation=True,
        details={
            "rows": [
                {
                    "devices": run.devices,
                    "batch": run.batch,
                    "step_seconds": run.step_seconds / run.slowed,
                    "images_per_second": run.slowed * run.batch / run.step_seconds,
                    "efficiency": run.efficiency,
                    "placement": run.placement,
                }
                for run in runs
            ]
        },
    )
