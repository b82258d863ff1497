"""The cost model: predicts the time of a training step under a placement, and ranks placements.

In a step each rank does the following, in this order:

1. Forward pass of its shards, for all networks that it holds.
2. Exchange of logits, which all ranks wait for. It is the only barrier of the step.
3. Backward pass of its students, then of its teachers that are not paused, in the order of the
   topology. A network on several ranks all-reduces its gradients in b buckets. The buckets become
   ready at equal intervals of the backward pass, or at its end if the network is a CUDA graph. An
   all-reduce starts when all ranks of the network have the bucket. A rank takes part in one
   all-reduce at a time, and computes meanwhile.
4. Update of the same networks in the same order, after the all-reduce of their gradients. Teachers
   also wait for the decision.
5. Forward pass of the next step, without any barrier.

If k steps share an update (`schedule.accumulate`), all-reduce and update are in every k-th step
only, and the predicted step is the mean of the k steps. So a step takes

    E over pauses [ max over ranks ( backward, all-reduce, update, forward ) ] + exchange

A rank computes each of its micro-batches (`compute.micro_batches`) in a pass of its own.

Times of a shard come from a profile (`profile.py`), linear between the measured sizes. An
all-reduce over r ranks takes b latencies + 2 (r-1)/r bytes / bandwidth. The exchange takes
one latency + received bytes / bandwidth.

    efficiency = (seconds of all networks with the whole batch on one device, expected over pauses)
                 / (ranks x seconds of the step)

Torch-free, and no clock is read.

Not covered: loading batches; computing that is slower during an all-reduce; memory that an
allocator holds without using it; links of unequal speed; ranks that share a core or a GPU; fewer
ranks than devices (on CPUs `auto.py` compares some, with one profile each); the effect of small
shards on accuracy (statistics of BatchNorm).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from switokd.distillation.topology import Topology
from switokd.errors import UsageError
from switokd.planning.candidates import Work, candidates
from switokd.planning.pauses import Pauses
from switokd.planning.profile import NetworkTimes, Profile
from switokd.runtime.placement import Placement

MAX_CANDIDATES = 4000
"""Number of candidates times patterns of pauses that are predicted, at most."""

NOISE = 0.02
"""Predictions that differ by less than this share count as equal: measurements are no better."""

BYTES_PER_VALUE = 4
VALUES_OF_LABEL = 2
"""Size of a label (int64) in the exchange, in float32 values."""


@dataclass(frozen=True)
class Prediction:
    """The predicted speed and memory of a placement."""

    placement: Placement
    step_seconds: float
    images_per_second: float
    """Images of the batch per second; every network sees all of them."""
    efficiency: float
    """0 to 1; above 1 only if a shard takes less time than its share of the whole batch."""
    memory_bytes: tuple[int, ...]
    """By rank: weights, buffers, gradients, optimizer state, activations for backward."""
    fits: bool
    """Whether every rank's memory is within that of the device; True if that is unknown."""


def shard_sizes(batch_size: int, devices: int) -> tuple[int, ...]:
    """Return the shard sizes to measure, ascending.

    They are the batch size, its halves, and the even share of a rank, which is at least 2.
    """
    smallest = max(batch_size // devices, 2)
    sizes = {batch_size, smallest}
    while (batch_size := batch_size // 2) > smallest:
        sizes.add(batch_size)
    return tuple(sorted(sizes))


def max_devices(topology: Topology, batch_size: int) -> int:
    """Return the most devices that can each hold a network or a shard of two samples."""
    return len(list(topology)) * max(batch_size // 2, 1)


def check_devices(topology: Topology, batch_size: int, devices: int) -> None:
    """Raise UsageError if no placement can use this number of devices."""
    if devices > max_devices(topology, batch_size):
        raise _too_many(batch_size, devices)


def _too_many(batch_size: int, devices: int) -> UsageError:
    return UsageError(
        f"a batch of {batch_size} images is too small for {devices} devices: a network on several "
        "ranks needs 2 images per rank; use fewer devices, or a larger data.batch_size"
    )


def choose(
    profile: Profile, topology: Topology, batch_size: int, devices: int, pauses: Pauses
) -> Prediction:
    """Return the placement to use; arguments and errors as in `rank_placements`."""
    return simplest_of_the_best(rank_placements(profile, topology, batch_size, devices, pauses))


def simplest_of_the_best(ranked: Sequence[Prediction]) -> Prediction:
    """Return the simplest of the placements that are within `NOISE` of the first one."""
    best = ranked[0]
    close = [
        p
        for p in ranked
        if p.fits == best.fits and p.step_seconds <= best.step_seconds * (1 + NOISE)
    ]
    return min(close, key=_complexity)


def rank_placements(
    profile: Profile,
    topology: Topology,
    batch_size: int,
    devices: int,
    pauses: Pauses,
    micro_batches: int = 1,
) -> list[Prediction]:
    """Predict the candidate placements on exactly `devices` ranks, best first.

    micro_batches: with more than one, only placements whose ranks share them evenly are candidates.

    Placements that fit into memory come before those that do not, then faster ones come first.
    If two times are equal to six digits, the simpler placement comes first (`_complexity`).
    Raises UsageError if a network was not profiled, if the batch is too small, or if no placement
    can share the micro-batches.
    """
    limit = max(MAX_CANDIDATES // len(pauses.patterns), 200)
    works = [_work(profile, topology, batch_size, p) for p in (pauses, Pauses.none())]
    found = candidates(topology, works, batch_size, devices, limit)
    found = [replace(placement, micro_batches=micro_batches) for placement in found]
    problems = [placement.problem_with(batch_size) for placement in found]
    placements = [p for p, problem in zip(found, problems, strict=True) if not problem]
    if not placements:
        too_many = _too_many(batch_size, devices)
        raise UsageError(problems[0]) if micro_batches > 1 and problems else too_many
    return sorted((predict(profile, p, batch_size, pauses) for p in placements), key=_sort_key)


def predict(profile: Profile, placement: Placement, batch_size: int, pauses: Pauses) -> Prediction:
    """Predict one placement; UsageError if one of its networks was not profiled."""
    step = _Step(profile, placement, batch_size)
    seconds = step.exchange() + sum(p * step.expected(paused) for paused, p in pauses.patterns)
    work = _work(profile, step.times, batch_size, pauses)
    memory = [0] * placement.world_size
    for name, shards in step.samples.items():
        for rank, n in shards.items():
            memory[rank] += step.times[name].memory(n)
    available = profile.device_memory_bytes
    return Prediction(
        placement=placement,
        step_seconds=seconds,
        images_per_second=batch_size / seconds if seconds else 0.0,
        efficiency=sum(work.values()) / (placement.world_size * seconds) if seconds else 1.0,
        memory_bytes=tuple(memory),
        fits=available is None or max(memory) <= available,
    )


def _sort_key(prediction: Prediction) -> tuple[bool, float, tuple[int, int, int]]:
    seconds = float(f"{prediction.step_seconds:.6g}")
    return not prediction.fits, seconds, _complexity(prediction)


def _complexity(prediction: Prediction) -> tuple[int, int, int]:
    """Count the networks on several ranks, those with uneven shards, and the table's entries."""
    rows = [row for _, row in prediction.placement.table]
    uneven = sum(len({weight for _, weight in row}) > 1 for row in rows)
    return sum(len(row) > 1 for row in rows), uneven, sum(len(row) for row in rows)


def _work(profile: Profile, names: Iterable[str], batch_size: int, pauses: Pauses) -> Work:
    """Return, by network, the expected seconds of a step with the whole batch on one device."""
    k = profile.accumulate
    return {n: _alone(profile.network(n), batch_size, pauses.share(n), k) for n in names}


def _alone(times: NetworkTimes, batch_size: int, paused: float, accumulate: int) -> float:
    """Return the expected seconds of one network. paused: share of the steps, 0 to 1."""
    learning = times.backward(batch_size) + times.update_seconds / accumulate
    return times.forward(batch_size) + (1 - paused) * learning


class _Step:
    """The model of one step under one placement, as the module's docstring describes it."""

    def __init__(self, profile: Profile, placement: Placement, batch_size: int) -> None:
        names = [name for name, _ in placement.table]
        self.world_size = placement.world_size
        self.communication = profile.communication
        self.accumulate = profile.accumulate
        target = profile.classes if profile.soft_targets else VALUES_OF_LABEL
        self.values_per_sample = profile.classes + target
        self.times = {name: profile.network(name) for name in names}
        self.samples = {
            name: {r: s.stop - s.start for r, s in placement.shards(name, batch_size).items()}
            for name in names
        }
        self.parts = {
            name: max(placement.micro_batches // len(row), 1) for name, row in placement.table
        }
        """Passes of a rank in a step, by network: one per micro-batch."""
        self.teachers = {name for name in names if self.times[name].role == "teacher"}
        self.order = sorted(names, key=lambda name: name in self.teachers)

    def exchange(self) -> float:
        """Return the seconds of the exchange; every rank sends as much as the largest sender."""
        samples_by_rank = [0] * self.world_size
        for shards in self.samples.values():
            for rank, n in shards.items():
                samples_by_rank[rank] += n
        size = max(samples_by_rank) * self.values_per_sample * BYTES_PER_VALUE
        return self.communication.all_gather(self.world_size, size)

    def expected(self, paused: frozenset[str]) -> float:
        """Return the mean seconds of `compute` over the steps that share an update."""
        k = self.accumulate
        without_update = self.compute(paused, updates=False) if k > 1 else 0.0
        return (self.compute(paused) + (k - 1) * without_update) / k

    def compute(self, paused: frozenset[str], updates: bool = True) -> float:
        """Return the seconds from the end of one exchange until all ranks are ready for the next.

        updates: whether gradients are all-reduced and applied in this step.
        """
        clock = [0.0] * self.world_size  # seconds since the exchange, by rank
        link_free = [0.0] * self.world_size  # end of the rank's last all-reduce
        learning = [name for name in self.order if name not in paused]
        reduced: dict[str, float] = {}  # end of a network's last all-reduce
        for name in learning:
            shards, times = self.samples[name], self.times[name]
            buckets = -(-times.gradient_bytes // self.communication.bucket_bytes) or 1
            start = 0.0
            for rank, n in shards.items():
                seconds = self.parts[name] * times.backward(n / self.parts[name])
                # The gradients of micro-batches are added up first.
                at_end = times.cuda_graphs or self.parts[name] > 1
                first = clock[rank] + seconds / (1 if at_end else buckets)
                start = max(start, first, link_free[rank])
                clock[rank] += seconds
            if len(shards) > 1 and updates:
                size = times.gradient_bytes / buckets
                per_bucket = self.communication.all_reduce(len(shards), size)
                last = max(clock[rank] for rank in shards)
                reduced[name] = max(start + buckets * per_bucket, last + per_bucket)
                for rank in shards:
                    link_free[rank] = reduced[name]
        for name in learning if updates else []:
            decided = self.communication.decision_seconds if name in self.teachers else 0.0
            start = max(reduced.get(name, 0.0), decided)
            for rank in self.samples[name]:
                clock[rank] = max(clock[rank], start) + self.times[name].update_seconds
        for name, shards in self.samples.items():
            for rank, n in shards.items():
                parts = self.parts[name]
                clock[rank] += parts * self.times[name].forward(n / parts)
        return max(clock)
