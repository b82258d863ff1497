"""Placements on simulated devices: how well more devices are used, and what the planner foresees.

WRN-16-10 and WRN-16-2 teach a MobileNet, as in the paper's table 7; their compute is a wait, in
proportion to samples and to the network's operations. Profiled by `switokd plan`'s own profiler,
placed by its planner, then run, with nobody pausing.

    efficiency = (seconds of all work on one device / devices) / measured step

Where there are more ranks than cores, simulated time is slowed down by ranks / cores, as is usual
for simulated networks: what a rank does beside its compute (input, loss, exchange, sums) takes that
much longer than on a core of its own, so its compute has to as well. Predictions are slowed down
alike. Costs that no core bears (waking up, a network's latency) are flattered by it, and gradients
here are next to nothing: adding up a real network's over a slow link is in no figure.

Not covered: real devices (all of this is a simulation); pauses; large gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import ranks
from bench.figures import Figure, Say
from bench.machine import cores
from switokd import models
from switokd.config import Config
from switokd.placement import Placement, dedicated, replicated
from switokd.plan import Pauses, Profile, choose, predict
from switokd.profile_networks import profile

FIGURES = (
    "simulated_efficiency",
    "plan_error",
    "simulated_strong_scaling",
    "simulated_weak_scaling",
)
NETWORKS = {"wrn-16-10": "teacher", "wrn-16-2": "teacher", "mobilenet": "student"}
BATCH, PER_DEVICE = 256, 32
SECONDS_PER_SAMPLE = 0.1 / PER_DEVICE
"""Of all networks together, before it is slowed down: 0.1 s a step of 32 samples per device, as on
one that computes 5 TFLOP/s."""
DIGITS = 1437


@dataclass(frozen=True)
class Measured:
    """One run on simulated devices."""

    devices: int
    batch: int
    slowed: float
    """How many times simulated time was slowed down."""
    placement: str
    table: Mapping[str, Mapping[int, float]]
    step_seconds: float
    predicted_seconds: float

    @property
    def efficiency(self) -> float:
        """Ideal step over the measured one."""
        ideal = self.slowed * self.batch * SECONDS_PER_SAMPLE / self.devices
        return ideal / self.step_seconds

    @property
    def plan_error(self) -> float:
        """How far the prediction was off, as a share of what was measured."""
        return abs(self.predicted_seconds - self.step_seconds) / self.step_seconds

    def record(self) -> dict[str, Any]:
        """For results.json."""
        return {**vars(self), "efficiency": self.efficiency, "plan_error": self.plan_error}


@cache
def operations() -> dict[str, tuple[float, float]]:
    """Each network's share of all operations: of forward, of backward. Images of 32 x 32.

    Backward counts twice as much as forward: torch's counter takes MobileNet's grouped
    convolutions for whole ones there.
    """
    counts = {}
    for name in NETWORKS:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            models.build(name, 3, 100)(torch.zeros(2, 3, 32, 32))
        counts[name] = counter.get_total_flops()
    total = 3 * sum(counts.values())
    return {name: (count / total, 2 * count / total) for name, count in counts.items()}


def slowdown(devices: int) -> float:
    """How many times longer than real time simulated time takes with so many ranks."""
    return max(devices / cores(), 1.0)


def slowed(profiled: Profile, times: float) -> Profile:
    """Give the same profile in slowed time."""
    networks = {
        name: network.model_copy(
            update={
                "forward_seconds": tuple(times * s for s in network.forward_seconds),
                "backward_seconds": tuple(times * s for s in network.backward_seconds),
                "update_seconds": times * network.update_seconds,
            }
        )
        for name, network in profiled.networks.items()
    }
    links = profiled.communication
    links = links.model_copy(
        update={
            "latency_seconds": times * links.latency_seconds,
            "bandwidth_bytes_per_second": links.bandwidth_bytes_per_second / times,
            "decision_seconds": times * links.decision_seconds,
        }
    )
    return profiled.model_copy(update={"networks": networks, "communication": links})


def run_file(batch: int, placement: Placement | None = None, steps: int = 8) -> dict[str, Any]:
    """Give the run file: an epoch of digits to warm up, then `steps` steps."""
    seconds = SECONDS_PER_SAMPLE * (slowdown(placement.world_size) if placement else 1.0)
    table = {name: dict(row) for name, row in placement.table} if placement else "dedicated"
    return {
        "name": "bench",
        "device": "cpu",
        "placement": table,
        "data": {"dataset": "digits", "batch_size": batch},
        "networks": {
            name: {
                "role": role,
                "model": "bench.simulated:Waiting",
                "model_kwargs": {
                    "seconds_per_sample_forward": seconds * operations()[name][0],
                    "seconds_per_sample_backward": seconds * operations()[name][1],
                },
            }
            for name, role in NETWORKS.items()
        },
        "distillation": {"strategy": "dml"},
        "schedule": {
            "epochs": 1 + -(-steps // (DIGITS // batch)),
            "max_steps": DIGITS // batch + steps,
        },
    }


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give simulated_efficiency, plan_error, and the scaling tables."""
    say("profiling simulated networks")
    config = Config.model_validate(run_file(BATCH))
    profiled = _profile(config)
    topology, steps = config.topology, 4 if quick else 8

    def planned(devices: int, batch: int = BATCH) -> Measured:
        placement = choose(profiled, topology, batch, devices, Pauses.none()).placement
        return run(placement, batch)

    def run(placement: Placement, batch: int = BATCH) -> Measured:
        say(f"simulation: {placement}")
        return _run(profiled, placement, batch, steps)

    best = [planned(8) for _ in range(2 if quick else 3)]
    yield _efficiency(best)
    largest, *small = topology
    others = [
        run(dedicated(topology, {largest: 6, **dict.fromkeys(small, 1)})),
        *([] if quick else [run(replicated(topology, 8))]),
        *([] if quick else [run(dedicated(topology, dict.fromkeys(topology, 1)))]),
    ]
    strong = [planned(n) for n in ((4,) if quick else (1, 2, 3, 4, 16))]
    strong = sorted([*strong, best[0]], key=lambda m: m.devices)
    weak = [] if quick else [planned(n, PER_DEVICE * n) for n in (1, 2, 4, 16)]
    weak = sorted([*weak, best[0]], key=lambda m: m.devices)
    yield _plan_error(best, [*others, *strong, *weak])
    yield _scaling("simulated_strong_scaling", strong, "a batch of 256")
    yield _scaling("simulated_weak_scaling", weak, "32 images per device")


def _profile(config: Config) -> Profile:
    """With as many threads as a rank has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return profile(config, (1, 8, 8), 10, torch.device("cpu"), (BATCH // 16, BATCH))
    finally:
        torch.set_num_threads(threads)


def _run(profiled: Profile, placement: Placement, batch: int, steps: int) -> Measured:
    times = slowdown(placement.world_size)
    record = ranks.train(run_file(batch, placement, steps), placement.world_size)
    return Measured(
        devices=placement.world_size,
        batch=batch,
        slowed=times,
        placement=str(placement),
        table={name: dict(row) for name, row in placement.table},
        step_seconds=record.step_seconds,
        predicted_seconds=predict(
            slowed(profiled, times), placement, batch, Pauses.none()
        ).step_seconds,
    )


def _efficiency(best: list[Measured]) -> Figure:
    return Figure.of_pairs(
        "simulated_efficiency",
        [(each.efficiency * each.step_seconds, each.step_seconds) for each in best],
        target=0.9,
        what="ideal step over measured step, 8 simulated devices, the planner's placement",
        simulation=True,
        details={
            "placement": best[0].placement,
            "work_shares": operations(),
            "time_slowed_by": best[0].slowed,
        },
    )


def _plan_error(best: list[Measured], others: list[Measured]) -> Figure:
    return Figure(
        "plan_error",
        tuple(each.plan_error for each in best),
        tuple((each.predicted_seconds, each.step_seconds) for each in best),
        target=0.15,
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
