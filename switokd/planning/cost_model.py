"""What a step would cost under a placement, and which placement costs least.

The model. In a step each rank, in this order,

1. forwards its shards of all networks that it holds;
2. takes part in the exchange of logits, which all ranks wait for: the step's only barrier;
3. runs backward of its students, then of its teachers that are not paused, in the topology's
   order. The gradients of a network on several ranks leave in b buckets, evenly over its backward
   (after it where it is a CUDA graph), each once the last rank has it; a rank takes part in one
   sum at a time, and computes meanwhile. Where `schedule.accumulate` makes k steps share an
   update, sums and updates (4.) are in every k-th step only; a step is then the mean of the k;
4. updates the same networks in the same order, each once its gradients are added up, and a teacher
   once the decision is here;
5. goes on to the next step's forward. Nothing waits for all ranks here.

So a step takes

    E over pauses [ max over ranks ( backwards, sums and updates, forwards ) ] + exchange

with times for a shard taken from a profile (`profile.py`): linear between the measured sizes. A
sum over r ranks costs b latencies + 2 (r-1)/r bytes / bandwidth, the exchange latency + received
bytes / bandwidth.

    efficiency = (seconds of all networks' whole batches on one device, expected over pauses)
                 / (ranks x seconds of the step)

Torch-free, and no clock is read.

Not covered: loading and moving batches; what sums take from the compute beside them; memory that
an allocator holds without use; links of unequal speed; ranks that share a core or a GPU; numbers
of ranks below what there are devices (on CPUs `auto.py` compares some, by a profile for each);
what small shards do to accuracy (BatchNorm's statistics).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from switokd.distillation.topology import Topology
from switokd.errors import UsageError
from switokd.planning.candidates import Work, candidates
from switokd.planning.pauses import Pauses
from switokd.planning.profile import NetworkTimes, Profile
from switokd.runtime.placement import BUCKET_BYTES, Placement

MOST_CANDIDATES = 4000
"""Where every step has one pattern of pauses; with more patterns fewer are predicted."""

NOISE = 0.02
"""Predictions closer than this share are not told apart: measurements are no better."""

BYTES_PER_VALUE = 4
VALUES_OF_LABEL = 2
"""Per sample, in the exchange: an int64."""


@dataclass(frozen=True)
class Prediction:
    """What a placement is expected to do."""

    placement: Placement
    step_seconds: float
    images_per_second: float
    """Of the batch, which all networks see."""
    efficiency: float
    """0 to 1; above 1 only where a shard takes less than its share of the batch's time."""
    memory_bytes: tuple[int, ...]
    """By rank: weights, buffers, gradients, optimizer state, what forward keeps."""
    fits: bool
    """Whether that is within the device's memory, as far as it is known."""


def shard_sizes(batch_size: int, devices: int) -> tuple[int, ...]:
    """Sizes to measure, ascending: the batch halved down to a rank's even part, 2 at least."""
    smallest = max(batch_size // devices, 2)
    sizes = {batch_size, smallest}
    while (batch_size := batch_size // 2) > smallest:
        sizes.add(batch_size)
    return tuple(sorted(sizes))


def most_devices(topology: Topology, batch_size: int) -> int:
    """Of which each has a network of its own, or two samples or more of one on several."""
    return len(list(topology)) * max(batch_size // 2, 1)


def check_devices(topology: Topology, batch_size: int, devices: int) -> None:
    """UsageError if there are too many for any placement; needs no profile."""
    if devices > most_devices(topology, batch_size):
        raise _too_many(batch_size, devices)


def _too_many(batch_size: int, devices: int) -> UsageError:
    return UsageError(
        f"batches of {batch_size} images cannot be shared by {devices} devices with 2 for each "
        "rank of a network; use fewer devices, or a larger data.batch_size if there are more images"
    )


def choose(
    profile: Profile, topology: Topology, batch_size: int, devices: int, pauses: Pauses
) -> Prediction:
    """Give the `simplest_of_the_best` of `rank_placements`."""
    return simplest_of_the_best(rank_placements(profile, topology, batch_size, devices, pauses))


def simplest_of_the_best(ranked: Sequence[Prediction]) -> Prediction:
    """Of the placements within `NOISE` of the first, the simplest: what to use."""
    first = ranked[0]
    near = [
        p
        for p in ranked
        if p.fits == first.fits and p.step_seconds <= first.step_seconds * (1 + NOISE)
    ]
    return min(near, key=_complexity)


def rank_placements(
    profile: Profile, topology: Topology, batch_size: int, devices: int, pauses: Pauses
) -> list[Prediction]:
    """Predict the placements of `candidates.py` on exactly `devices` ranks, best first.

    Those that fit into memory come before those that do not. Of two equal to six digits the
    simpler is first: fewer networks on several ranks, fewer unevenly, fewer networks on a rank.
    UsageError if a network was not profiled, or if the batch is too small for so many ranks.
    """
    limit = max(MOST_CANDIDATES // len(pauses.patterns), 200)
    works = [_work(profile, topology, batch_size, each) for each in (pauses, Pauses.none())]
    found = candidates(topology, works, batch_size, devices, limit)
    found = [p for p in found if not p.problem_with(batch_size)]
    if not found:
        raise _too_many(batch_size, devices)
    return sorted((predict(profile, p, batch_size, pauses) for p in found), key=_badness)


def predict(profile: Profile, placement: Placement, batch_size: int, pauses: Pauses) -> Prediction:
    """Predict one placement, any. UsageError if a network of its was not profiled."""
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


def _badness(prediction: Prediction) -> tuple[bool, float, tuple[int, int, int]]:
    seconds = float(f"{prediction.step_seconds:.6g}")
    return not prediction.fits, seconds, _complexity(prediction)


def _complexity(prediction: Prediction) -> tuple[int, int, int]:
    """Networks on several ranks, unevenly spread ones, places in the table."""
    rows = [row for _, row in prediction.placement.table]
    uneven = sum(len({weight for _, weight in row}) > 1 for row in rows)
    return sum(len(row) > 1 for row in rows), uneven, sum(len(row) for row in rows)


def _work(profile: Profile, names: Iterable[str], batch_size: int, pauses: Pauses) -> Work:
    """By network: seconds of a step with the whole batch on one device, expected over pauses."""
    k = profile.accumulate
    return {n: _whole(profile.network(n), batch_size, pauses.share(n), k) for n in names}


def _whole(times: NetworkTimes, batch_size: int, paused: float, accumulate: int) -> float:
    learning = times.backward(batch_size) + times.update_seconds / accumulate
    return times.forward(batch_size) + (1 - paused) * learning


class _Step:
    """A step under one placement; see the model above."""

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
        self.teachers = {name for name in names if self.times[name].role == "teacher"}
        self.order = sorted(names, key=lambda name: name in self.teachers)

    def exchange(self) -> float:
        """Seconds of the exchange itself; every rank sends as much as the one with most."""
        mine = [0] * self.world_size
        for shards in self.samples.values():
            for rank, n in shards.items():
                mine[rank] += n
        size = max(mine) * self.values_per_sample * BYTES_PER_VALUE
        return self.communication.all_gather(self.world_size, size)

    def expected(self, paused: frozenset[str]) -> float:
        """Mean seconds of `compute` over the steps that share an update."""
        k = self.accumulate
        others = self.compute(paused, updates=False) if k > 1 else 0.0
        return (self.compute(paused) + (k - 1) * others) / k

    def compute(self, paused: frozenset[str], updates: bool = True) -> float:
        """Seconds from one exchange to where the last rank is ready for the next.

        updates: whether gradients are added up and applied in this step.
        """
        at = [0.0] * self.world_size  # each rank's clock
        sums_end = [0.0] * self.world_size
        learning = [name for name in self.order if name not in paused]
        summed: dict[str, float] = {}
        for name in learning:
            shards, times = self.samples[name], self.times[name]
            buckets = -(-times.gradient_bytes // BUCKET_BYTES) or 1
            starts = 0.0
            for rank, n in shards.items():
                first = at[rank] + times.backward(n) / (1 if times.recorded else buckets)
                starts = max(starts, first, sums_end[rank])
                at[rank] += times.backward(n)
            if len(shards) > 1 and updates:
                size = times.gradient_bytes / buckets
                one = self.communication.all_reduce(len(shards), size)
                last = max(at[rank] for rank in shards)
                summed[name] = max(starts + buckets * one, last + one)
                for rank in shards:
                    sums_end[rank] = summed[name]
        for name in learning if updates else []:
            decided = self.communication.decision_seconds if name in self.teachers else 0.0
            starts = max(summed.get(name, 0.0), decided)
            for rank in self.samples[name]:
                at[rank] = max(at[rank], starts) + self.times[name].update_seconds
        for name, shards in self.samples.items():
            for rank, n in shards.items():
                at[rank] += self.times[name].forward(n)
        return max(at)
