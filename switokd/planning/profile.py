"""A profile: the cost of each network on one device, per shard size, and of communication.

It is a JSON file: measured on one machine, read on another, and edited by hand if needed.
Times are in seconds, sizes in bytes. Torch-free.

Not covered: measuring a profile (`profiler.py`); predictions from a profile (`cost_model.py`).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from switokd.config.base import Section
from switokd.config.config import Config
from switokd.config.sections import Compute, Network
from switokd.errors import UsageError

MAX_BYTES = 1e18
"""A larger number of bytes is a mistake, as is a duration above 1e9 seconds (30 years)."""
Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Duration = Annotated[float, Field(ge=0, le=1e9)]
Seconds = tuple[Duration, ...]


class Communication(Section):
    """The cost of communication between ranks: constants, the same for every pair of ranks."""

    description: str
    """Backend and devices, and whether the constants were measured."""
    latency_seconds: Duration
    """Latency of one collective with little data."""
    bandwidth_bytes_per_second: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """Bandwidth from one rank to its neighbour, per direction."""
    decision_seconds: Duration
    """Time from the exchange of logits to the arrival of the decision, which teachers' updates
    wait for."""
    bucket_bytes: Annotated[int, Field(ge=1, le=MAX_BYTES)] = 8 * 2**20
    """Size of the gradients that one all-reduce carries (`training/reducer.py`)."""

    def all_reduce(self, ranks: int, size: float) -> float:
        """Return the seconds of a ring all-reduce of `size` bytes over `ranks` ranks."""
        if ranks == 1:
            return 0.0
        sent = 2 * (ranks - 1) / ranks * size
        return self.latency_seconds + sent / self.bandwidth_bytes_per_second

    def all_gather(self, ranks: int, size: int) -> float:
        """Return the seconds of an all-gather of `size` bytes per rank over `ranks` ranks."""
        if ranks == 1:
            return 0.0
        return self.latency_seconds + (ranks - 1) * size / self.bandwidth_bytes_per_second


ASSUMED_DECISION_SECONDS = 1e-3
GLOO_LOOPBACK = Communication(
    description="Gloo between processes of one machine (assumed)",
    latency_seconds=4e-4,
    bandwidth_bytes_per_second=0.8e9,
    decision_seconds=ASSUMED_DECISION_SECONDS,
)
NCCL_NVLINK = Communication(
    description="NCCL over NVLink (assumed)",
    latency_seconds=5e-5,
    bandwidth_bytes_per_second=200e9,
    decision_seconds=ASSUMED_DECISION_SECONDS,
)


class NetworkTimes(Section):
    """The cost of one network on one device.

    samples, forward_seconds, backward_seconds: measured shard sizes (ascending) and their times.
    """

    role: Literal["teacher", "student"]
    model: str
    model_kwargs: Mapping[str, Any] = {}
    """model and model_kwargs as in the run file."""
    optimizer: str = "sgd"
    """Name of the optimizer."""
    frozen: bool = False
    """Whether the network is never trained; backward and update then take no time."""
    cuda_graphs: bool = False
    """Whether forward and backward were launched as CUDA graphs."""
    samples: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    forward_seconds: Seconds
    backward_seconds: Seconds
    """Loss and backward pass, without the all-reduce of gradients over ranks."""
    update_seconds: Duration
    """Optimizer step with everything that belongs to it; the same for any shard size."""
    parameter_bytes: Bytes
    """Weights and buffers, and their moving average if there is one."""
    gradient_bytes: Bytes
    optimizer_bytes: Bytes
    """State of the optimizer."""
    activation_bytes_per_sample: Annotated[float, Field(ge=0, le=MAX_BYTES)]
    """Memory that the forward pass keeps for the backward pass, per sample."""
    activation_bytes_fixed: Bytes = 0
    """Memory that the forward pass keeps for any number of samples, such as bfloat16 weights."""

    @model_validator(mode="after")
    def _one_time_per_size(self) -> NetworkTimes:
        if not len(self.samples) == len(self.forward_seconds) == len(self.backward_seconds):
            raise ValueError("samples, forward_seconds and backward_seconds must be equally long")
        if list(self.samples) != sorted(set(self.samples)):
            raise ValueError("samples must ascend")
        return self

    def forward(self, samples: float) -> float:
        """Return the seconds of a forward pass of `samples` samples."""
        return _interpolate(self.samples, self.forward_seconds, samples)

    def backward(self, samples: float) -> float:
        """Return the seconds of a backward pass of `samples` samples."""
        return _interpolate(self.samples, self.backward_seconds, samples)

    def memory(self, samples: int) -> int:
        """Return the bytes that the network needs on a rank with a shard of `samples` samples."""
        fixed = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        if samples:
            fixed += self.activation_bytes_fixed
        return fixed + round(samples * self.activation_bytes_per_sample)


class Profile(Section):
    """Measurements of all networks of a run on one device, and the conditions of measuring."""

    device: str
    """Name of the device."""
    device_memory_bytes: Bytes | None = None
    """Memory for the networks of a rank; null if unknown."""
    threads: Annotated[int, Field(ge=1)]
    """CPU threads of the process that measured."""
    torch: str
    """Version of torch."""
    image: tuple[int, int, int]
    """Channels, height, width."""
    classes: Annotated[int, Field(ge=1)]
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    """precision, channels_last and compile as in `compute` of the run file."""
    soft_targets: bool = False
    """Whether a sample has a distribution over the classes as its target, instead of a label."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """schedule.accumulate: number of steps that share one optimizer step."""
    networks: Annotated[dict[str, NetworkTimes], Field(min_length=1)]
    """In the topology's order."""
    communication: Communication

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shard sizes that were measured for any network, ascending."""
        return tuple(sorted({n for network in self.networks.values() for n in network.samples}))

    def network(self, name: str) -> NetworkTimes:
        """Return the costs of a network; UsageError if the profile has no such network."""
        if name not in self.networks:
            known = ", ".join(self.networks)
            raise UsageError(f"the profile has no network {name} (it has {known}); profile again")
        return self.networks[name]

    def check(
        self,
        networks: Mapping[str, Network],
        frozen_teachers: bool = False,
        with_cuda_graphs: Collection[str] = (),
    ) -> None:
        """Raise UsageError unless the profile was measured with these networks.

        A network that was measured frozen has no times for training. A network that was measured
        in training may be frozen now: it is then always paused.
        frozen_teachers: whether the teachers are frozen.
        with_cuda_graphs: networks that a GPU launches as CUDA graphs.
        """
        for name, n in networks.items():
            times = self.network(name)
            expected, profiled = _describe(n, n.optimizer.name), _describe(times, times.optimizer)
            is_frozen = frozen_teachers and n.role == "teacher"
            if times.frozen and not is_frozen:
                profiled += ", frozen"
            if expected != profiled:
                raise UsageError(
                    f"{name} is {profiled} in the profile, and {expected} in the run file; "
                    "profile again"
                )
            if times.cuda_graphs != (self.device != "cpu" and name in with_cuda_graphs):
                before, now = ("with", "without") if times.cuda_graphs else ("without", "with")
                raise UsageError(
                    f"{name} was profiled {before} CUDA graphs, and the run trains it {now} them "
                    "(compute.cuda_graphs, schedule.accumulate, compute.batch_norm); profile again"
                )

    def check_conditions(self, image: tuple[int, int, int], classes: int, compute: Compute) -> None:
        """Raise UsageError unless the profile has these images, classes and compute settings.

        image: channels, height, width.
        """
        for name, profiled, expected in (
            ("images", self.image, image),
            ("classes", self.classes, classes),
            ("compute.precision", self.precision, compute.precision),
            ("compute.channels_last", self.channels_last, compute.channels_last),
            ("compute.compile", self.compile, compute.compile),
        ):
            if profiled != expected:
                raise UsageError(
                    f"the profile was measured with {name} {profiled}, and the run file has "
                    f"{expected}; profile again"
                )

    def save(self, path: Path) -> None:
        """Write the profile as JSON; UsageError if the file cannot be written."""
        try:
            path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile; UsageError if the file cannot be read or is no profile."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UsageError(f"{path}: cannot be read as a profile: {reason}") from None
        except ValidationError as error:
            problems = error.errors(include_url=False)
            # A misspelt key gives two errors, unknown and missing; the first one helps more.
            problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
            key = ".".join(str(part) for part in problem["loc"])
            reason = problem["msg"].removeprefix("Value error, ")
            reason = f"{key}: {reason}" if key else reason
            raise UsageError(f"{path}: not a profile of 'switokd plan': {reason}") from None


def _describe(network: Network | NetworkTimes, optimizer: str) -> str:
    """Describe role, model and optimizer: 'a teacher, wrn-16-2 {"dropout": 0.1}, sgd'."""
    kwargs = json.loads(network.model_dump_json(include={"model_kwargs"}))["model_kwargs"]
    arguments = " " + json.dumps(kwargs, sort_keys=True) if kwargs else ""
    return f"a {network.role}, {network.model}{arguments}, {optimizer}"


@lru_cache(maxsize=100_000)
def _interpolate(samples: tuple[int, ...], seconds: tuple[float, ...], n: float) -> float:
    """Interpolate the seconds for `n` samples linearly between the two nearest measurements.

    Above the largest size the last line is continued, with a slope of at least 0. Below the
    smallest size the result is at least proportional to `n`. No samples take 0 seconds.
    """
    if n == 0:
        return 0.0
    if len(samples) == 1:
        return seconds[0] * n / samples[0]
    right = min(max(bisect_left(samples, n), 1), len(samples) - 1)
    left = right - 1
    slope = (seconds[right] - seconds[left]) / (samples[right] - samples[left])
    if n > samples[-1]:
        slope = max(slope, 0.0)
    least = seconds[0] * n / samples[0] if n < samples[0] else 0.0
    return max(seconds[right] + slope * (n - samples[right]), least)


def saved_profile(config: Config, path: Path, image: tuple[int, int, int], classes: int) -> Profile:
    """Read a profile for a run; UsageError if it does not fit the run.

    image: channels, height, width of the run's images.
    """
    profile = Profile.load(path)
    try:
        graphed = [name for name in config.networks if config.wants_cuda_graphs(name)]
        profile.check(config.networks, config.method.strategy.frozen_teachers, graphed)
        profile.check_conditions(image, classes, config.compute)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    soft_targets, steps = config.data.has_soft_targets, config.schedule.accumulate
    return profile.model_copy(update={"soft_targets": soft_targets, "accumulate": steps})
