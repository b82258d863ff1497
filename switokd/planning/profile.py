"""A profile: what each network costs on one device, by samples, and what communication costs.

A file of JSON, so that it can be measured on one machine, read on another, and edited by hand.
Times in seconds, sizes in bytes. Torch-free.

Not covered: measuring it (`profiler.py`); what follows from it (`cost_model.py`).
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

MUCH = 1e18
"""More bytes than that are a mistake; so are 1e9 seconds, thirty years."""
Bytes = Annotated[int, Field(ge=0, le=MUCH)]
Duration = Annotated[float, Field(ge=0, le=1e9)]
Seconds = tuple[Duration, ...]


class Communication(Section):
    """What it costs to bring ranks together: constants, equal between all ranks."""

    description: str
    """What the constants stand for, and whether they were measured."""
    latency_seconds: Duration
    """Of one collective, however small."""
    bandwidth_bytes_per_second: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """Between one rank and its neighbour, in each direction."""
    decision_seconds: Duration
    """From the exchange of logits until the decision is here; teachers' updates wait for it."""

    def all_reduce(self, ranks: int, size: float) -> float:
        """Seconds in which `ranks` ranks add up `size` bytes each, by a ring."""
        if ranks == 1:
            return 0.0
        travels = 2 * (ranks - 1) / ranks * size
        return self.latency_seconds + travels / self.bandwidth_bytes_per_second

    def all_gather(self, ranks: int, size: int) -> float:
        """Seconds in which each of `ranks` ranks hands `size` bytes to all others."""
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
    """One network on one device. `samples` ascend; the times beside them are for so many."""

    role: Literal["teacher", "student"]
    model: str
    model_kwargs: Mapping[str, Any] = {}
    """Both as in the run file."""
    optimizer: str = "sgd"
    """Its name."""
    frozen: bool = False
    """Whether it only ever answers: nothing is learned then, and there is no time for that."""
    recorded: bool = False
    """Whether forward and backward were launched as CUDA graphs."""
    samples: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    forward_seconds: Seconds
    backward_seconds: Seconds
    """Loss and gradients, without adding them up over ranks."""
    update_seconds: Duration
    """Of all that is done with the gradients; the same for any shard."""
    parameter_bytes: Bytes
    """Weights and buffers, and their moving average if it is kept."""
    gradient_bytes: Bytes
    optimizer_bytes: Bytes
    """The optimizer's state."""
    activation_bytes_per_sample: Annotated[float, Field(ge=0, le=MUCH)]
    """What forward keeps for backward."""
    activation_bytes_fixed: Bytes = 0
    """Of that, what does not grow with the samples, such as weights in bfloat16."""

    @model_validator(mode="after")
    def _one_time_per_size(self) -> NetworkTimes:
        if not len(self.samples) == len(self.forward_seconds) == len(self.backward_seconds):
            raise ValueError("samples, forward_seconds and backward_seconds must be equally long")
        if list(self.samples) != sorted(set(self.samples)):
            raise ValueError("samples must ascend")
        return self

    def forward(self, samples: int) -> float:
        """Seconds of forward with so many samples."""
        return _interpolate(self.samples, self.forward_seconds, samples)

    def backward(self, samples: int) -> float:
        """Seconds of backward with so many samples."""
        return _interpolate(self.samples, self.backward_seconds, samples)

    def memory(self, samples: int) -> int:
        """Bytes on a rank with a shard of so many samples."""
        fixed = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        if samples:
            fixed += self.activation_bytes_fixed
        return fixed + round(samples * self.activation_bytes_per_sample)


class Profile(Section):
    """What a plan is made of."""

    device: str
    """Name of what was measured on."""
    device_memory_bytes: Bytes | None = None
    """What a rank's networks have to fit into; null where that is not known."""
    threads: Annotated[int, Field(ge=1)]
    """CPU threads of the measuring process."""
    torch: str
    """Its version."""
    image: tuple[int, int, int]
    """Channels, height, width."""
    classes: Annotated[int, Field(ge=1)]
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    """These three as in the run file's compute."""
    soft_targets: bool = False
    """Whether the exchange carries a distribution over the classes for each sample, not a label."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """schedule.accumulate: steps that share an update."""
    networks: Annotated[dict[str, NetworkTimes], Field(min_length=1)]
    """In the topology's order."""
    communication: Communication

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shard sizes that were measured for any network, ascending."""
        return tuple(sorted({n for network in self.networks.values() for n in network.samples}))

    def network(self, name: str) -> NetworkTimes:
        """One network's; UsageError if it was not profiled."""
        if name not in self.networks:
            known = ", ".join(self.networks)
            raise UsageError(f"the profile has no network {name} (it has {known}); profile again")
        return self.networks[name]

    def check(
        self,
        networks: Mapping[str, Network],
        frozen_teachers: bool = False,
        recorded: Collection[str] = (),
    ) -> None:
        """UsageError unless it was made of these.

        What was frozen has no time for learning; what learned may be frozen now, and always pauses.
        recorded: those that a GPU launches as CUDA graphs.
        """
        for name, n in networks.items():
            found = self.network(name)
            ours, theirs = _describe(n, n.optimizer.name), _describe(found, found.optimizer)
            is_frozen = frozen_teachers and n.role == "teacher"
            if found.frozen and not is_frozen:
                theirs += ", frozen"
            if ours != theirs:
                raise UsageError(
                    f"the profile's {name} is {theirs}; the run file's {ours}; profile again"
                )
            if found.recorded != (self.device != "cpu" and name in recorded):
                raise UsageError(
                    f"the profile's {name} was measured with{'' if found.recorded else 'out'} CUDA "
                    f"graphs, and is trained with{'out' if found.recorded else ''} them "
                    "(compute.cuda_graphs, schedule.accumulate, compute.batch_norm); profile again"
                )

    def check_conditions(self, image: tuple[int, int, int], classes: int, compute: Compute) -> None:
        """UsageError unless it was measured on such images, and computing like this."""
        for what, here, there in (
            ("images", self.image, image),
            ("classes", self.classes, classes),
            ("compute.precision", self.precision, compute.precision),
            ("compute.channels_last", self.channels_last, compute.channels_last),
            ("compute.compile", self.compile, compute.compile),
        ):
            if here != there:
                raise UsageError(
                    f"the profile was made with {what} {here}, the run file has {there}; "
                    "profile again"
                )

    def save(self, path: Path) -> None:
        """Write it as JSON; UsageError if that cannot be done."""
        try:
            path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read one; UsageError, of one line, if it is none."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UsageError(f"{path}: cannot be read as a profile: {reason}") from None
        except ValidationError as error:
            problems = error.errors(include_url=False)
            # A misspelt key is missing as well; the misspelling is the better news.
            problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
            key = ".".join(str(part) for part in problem["loc"])
            words = problem["msg"].removeprefix("Value error, ")
            words = f"{key}: {words}" if key else words
            raise UsageError(f"{path}: not a profile of 'switokd plan': {words}") from None


def _describe(network: Network | NetworkTimes, optimizer: str) -> str:
    """What a network's times depend on most: 'a teacher, wrn-16-2 {"dropout": 0.1}, sgd'."""
    kwargs = json.loads(network.model_dump_json(include={"model_kwargs"}))["model_kwargs"]
    given = " " + json.dumps(kwargs, sort_keys=True) if kwargs else ""
    return f"a {network.role}, {network.model}{given}, {optimizer}"


@lru_cache(maxsize=100_000)
def _interpolate(samples: tuple[int, ...], seconds: tuple[float, ...], n: int) -> float:
    """Seconds for `n` samples: 0 for 0, else on the line through the two nearest measurements.

    Beyond the largest size the line goes on, but never down. Below the smallest, where overhead
    keeps a shard from being as cheap as the line says, a part costs its share at least.
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
    """Read a profile for `config` and its images; UsageError if it is of something else."""
    found = Profile.load(path)
    try:
        recorded = [name for name in config.networks if config.wants_cuda_graphs(name)]
        found.check(config.networks, config.method.strategy.frozen_teachers, recorded)
        found.check_conditions(image, classes, config.compute)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    soft, steps = config.data.has_soft_targets, config.schedule.accumulate
    return found.model_copy(update={"soft_targets": soft, "accumulate": steps})
