"""Simulated devices, one per process, with a given speed.

WRN-16-10 and WRN-16-2 teach a MobileNet, as in the paper's table 7. Instead of computing, they wait
for a time proportional to samples and operations. Everything else is real: processes, collectives,
the coordinator. The profiler and the planner of `switokd plan` choose a placement, then the
networks are trained without pauses.

With more ranks than cores, simulated time is slowed down by ranks / cores. The other work of a rank
(input, loss, exchange, all-reduce) takes that much longer than on a core of its own. Its compute
must therefore take longer too. Predictions are slowed down in the same way. Costs that
need no core (waking up, latency of a network) look too small because of this.

Not covered: pauses; links other than this machine's loopback.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import ranks
from switokd.config.config import Config
from switokd.models import registry
from switokd.planning.cost_model import choose, predict
from switokd.planning.measure_links import measure_links
from switokd.planning.pauses import Pauses
from switokd.planning.profile import Communication, Profile
from switokd.planning.profiler import profile
from switokd.runtime.environment import cores, environment
from switokd.runtime.placement import Placement
from switokd.runtime.process_group import join_world

NETWORKS = {"wrn-16-10": "teacher", "wrn-16-2": "teacher", "mobilenet": "student"}
BATCH, PER_DEVICE = 256, 32
SECONDS_PER_SAMPLE = 0.1 / PER_DEVICE
"""Seconds per sample of all networks together, before any slowdown.

A step of 32 samples per device takes 0.1 s, as on a device with 5 TFLOP/s.
"""
DIGITS = 1437
"""Number of training images of the digits data set."""


@dataclass(frozen=True)
class Devices:
    """Properties of the simulated devices."""

    seconds_per_sample: float = SECONDS_PER_SAMPLE
    """Forward and backward pass of all networks together."""
    is_slowed: bool = True
    """Whether simulated time is slowed down when ranks share cores."""
    gradients: bool = False
    """Whether gradients have the size of the simulated networks' gradients."""
    images: int = DIGITS
    """Images per epoch."""

    def slowdown(self, devices: int) -> float:
        """Real time divided by simulated time, for this number of devices."""
        return max(devices / cores(), 1.0) if self.is_slowed else 1.0

    def run_file(
        self, batch: int, placement: Placement | None = None, steps: int = 8
    ) -> dict[str, Any]:
        """Run file with one epoch of digits to warm up, then `steps` steps."""
        table = {name: dict(row) for name, row in placement.table} if placement else "dedicated"
        times = self.slowdown(placement.world_size) if placement else 1.0
        return {
            "name": "bench",
            "device": "cpu",
            "placement": table,
            "data": {"dataset": "digits", "batch_size": batch, "train_samples": self.images},
            "networks": {
                name: {
                    "role": role,
                    "model": "bench.simulated:SimulatedNetwork",
                    "model_kwargs": self._model_kwargs(name, times * self.seconds_per_sample),
                }
                for name, role in NETWORKS.items()
            },
            "distillation": {"strategy": "dml"},
            "schedule": {
                "epochs": 1 + -(-steps // (self.images // batch)),
                "max_steps": self.images // batch + steps,
            },
        }

    def _model_kwargs(self, name: str, seconds_per_sample: float) -> dict[str, Any]:
        forward, backward = operations()[name]
        return {
            "seconds_per_sample_forward": seconds_per_sample * forward,
            "seconds_per_sample_backward": seconds_per_sample * backward,
            "parameters": parameters()[name] if self.gradients else 0,
        }


@dataclass(frozen=True)
class Measured:
    """Result of one run on simulated devices."""

    devices: int
    batch: int
    slowed: float
    """Slowdown of simulated time."""
    placement: str
    table: Mapping[str, Mapping[int, float]]
    ideal_seconds: float
    """Seconds for the work of all networks on one device, divided by the number of devices."""
    step_seconds: float
    predicted_seconds: float

    @property
    def efficiency(self) -> float:
        """Ideal step time divided by the measured step time."""
        return self.ideal_seconds / self.step_seconds

    @property
    def plan_error(self) -> float:
        """Relative error of the predicted step time."""
        return abs(self.predicted_seconds - self.step_seconds) / self.step_seconds

    def to_json(self) -> dict[str, Any]:
        """Content for results.json."""
        return {**vars(self), "efficiency": self.efficiency, "plan_error": self.plan_error}


class Simulation:
    """Runs on devices of one kind, with the profile that the planner uses."""

    def __init__(self, devices: Devices, steps: int, batch: int = BATCH) -> None:
        self.devices = devices
        self.steps = steps
        self.config = Config.model_validate(devices.run_file(batch))
        self._profile = _profile(self.config)
        self._links = cache(links_between)

    def planned(self, devices: int, batch: int = BATCH) -> Placement:
        """Placement that the planner chooses for this number of devices."""
        profiled, topology = self.profile_of(devices), self.config.topology
        return choose(profiled, topology, batch, devices, Pauses.none()).placement

    def run(self, placement: Placement, batch: int = BATCH) -> Measured:
        """Train on simulated devices, one per rank of the placement."""
        count = placement.world_size
        times = self.devices.slowdown(count)
        result = ranks.train(self.devices.run_file(batch, placement, self.steps), count)
        predicted = predict(self.profile_of(count), placement, batch, Pauses.none())
        return Measured(
            devices=count,
            batch=batch,
            slowed=times,
            placement=str(placement),
            table={name: dict(row) for name, row in placement.table},
            ideal_seconds=times * batch * self.devices.seconds_per_sample / count,
            step_seconds=result.step_seconds,
            predicted_seconds=predicted.step_seconds,
        )

    def profile_of(self, devices: int) -> Profile:
        """Profile for this number of devices, in slowed-down time."""
        has_links = self.devices.gradients and devices > 1
        links = self._links(devices) if has_links else None
        return slowed(self._profile, self.devices.slowdown(devices), links)


@cache
def operations() -> dict[str, tuple[float, float]]:
    """Share of (forward, backward) of each network in all operations, for 32 x 32 images.

    Backward counts as twice the forward pass, because PyTorch's counter counts the backward pass
    of MobileNet's grouped convolutions as if they were not grouped.
    """
    counts = {}
    for name in NETWORKS:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            registry.build(name, 3, 100)(torch.zeros(2, 3, 32, 32))
        counts[name] = counter.get_total_flops()
    total = 3 * sum(counts.values())
    return {name: (count / total, 2 * count / total) for name, count in counts.items()}


@cache
def parameters() -> dict[str, int]:
    """Number of weights of each network."""
    return {name: registry.parameter_count(registry.build(name, 3, 100)) for name in NETWORKS}


def slowed(profiled: Profile, times: float, links: Communication | None = None) -> Profile:
    """The same profile in slowed-down time.

    links: links measured in slowed-down time; None slows down the assumed links.
    """
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
    assumed = profiled.communication
    links = links or assumed.model_copy(
        update={
            "latency_seconds": times * assumed.latency_seconds,
            "bandwidth_bytes_per_second": assumed.bandwidth_bytes_per_second / times,
        }
    )
    links = links.model_copy(update={"decision_seconds": times * assumed.decision_seconds})
    return profiled.model_copy(update={"networks": networks, "communication": links})


def links_between(devices: int) -> Communication:
    """Measure the links between this number of ranks on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        ranks.run(_links, devices, {}, Path(folder))
        return Communication.model_validate_json((Path(folder) / "links.json").read_text())


def _links(folder: Path, arguments: Mapping[str, Any]) -> None:
    with join_world(environment(os.environ), torch.device("cpu"), 60) as world:
        links = measure_links(world, decision_seconds=0.0)
        if links and world.rank == 0:
            (folder / "links.json").write_text(json.dumps(links.model_dump()))


def _profile(config: Config) -> Profile:
    """Profile the networks with one thread, like a rank."""
    threads, batch = torch.get_num_threads(), config.data.batch_size
    torch.set_num_threads(1)
    try:
        return profile(config, (1, 8, 8), 10, torch.device("cpu"), (batch // 16, batch))
    finally:
        torch.set_num_threads(threads)
