"""Measures each network on this machine's device: forward, backward and update per shard size.

A network is built and warmed up as for training, and gets random images. The state of the random
number generators is restored afterwards. Learning rates are 0, so that random images do not change
the weights. Times are wall-clock times between two moments when the device is idle; a training step
also starts and ends its exchange with an idle device.

Not covered: communication, which is measured between existing ranks (`measure_links.py`) or assumed
(`profile.py`); compiled networks at sizes other than the smallest and the largest; the time of
compiling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from switokd.config.config import Config
from switokd.config.sections import Compute, Network
from switokd.data.augment import seeding
from switokd.data.prefetch import in_order
from switokd.distillation.couplings import Term
from switokd.errors import UsageError
from switokd.models import registry
from switokd.planning.profile import (
    GLOO_LOOPBACK,
    NCCL_NVLINK,
    Communication,
    NetworkTimes,
    Profile,
)
from switokd.runtime.device import device_memory
from switokd.runtime.environment import Environment
from switokd.runtime.process_group import World
from switokd.training.build import make_learner, tf32
from switokd.training.learner import Learner
from switokd.training.reducer import BUCKET_BYTES
from switokd.training.schedules import AccumulationWindow
from switokd.training.warm_up import warm_up

MIN_REPETITIONS, MAX_REPETITIONS = 3, 30
"""Measured steps per size, after a first step that is not counted."""
BUDGET_SECONDS = 0.4
"""Time per network and size. Slow networks take longer: they need `MIN_REPETITIONS` steps."""
SLOW_SECONDS = 2.0
"""A size whose first step takes longer is measured by this one step."""
MAX_STEP_SECONDS = 10.0
"""A size whose step would take longer is not measured, unless it is the smallest size."""

PhaseSeconds = tuple[float, float, float]
"""Seconds of forward, backward and update in one step."""
ProgressCall = Callable[[str, int, int], None]
"""Called with the network being measured, the stages that are done, and the number of stages."""


def profile(
    config: Config,
    images_shape: tuple[int, int, int],
    classes: int,
    device: torch.device,
    sizes: Sequence[int],
    progress: ProgressCall | None = None,
    links: Communication | None = None,
    memory: int | None = None,
) -> Profile:
    """Measure all networks of `config` with shards of `sizes` samples on `device`.

    images_shape: channels, height, width. progress: called before each stage, and at the end.
    links: measured costs of communication; None: assumed costs.
    memory: bytes that a network may use; None: all memory of the device. A size that needs more
    memory, or more than `MAX_STEP_SECONDS`, is left out, unless it is the smallest.
    UsageError if a network cannot be built, or if no size fits into memory.
    """
    sizes, memory = sorted(set(sizes)), memory or device_memory(device)
    if config.compute.compile:  # compiling takes long for each size
        sizes = sorted({sizes[0], sizes[-1]})
    stages, on_gpu, networks = len(sizes) + 1, device.type == "cuda", {}
    gpus = [device] if on_gpu else []
    with seeding(), torch.random.fork_rng(devices=gpus), tf32(config.compute):
        for i, (name, network) in enumerate(config.networks.items()):

            def report(stage: int, name: str = name, before: int = i * stages) -> None:
                if progress:
                    progress(name, before + stage, len(config.networks) * stages)

            benchmark = _benchmark(config, name, images_shape, classes, device)
            times = benchmark.measure(sizes, report, memory)
            if not times:
                raise UsageError(
                    f"network {name} ({network.model}) does not fit into the memory of {device} "
                    f"with {sizes[0]} images; choose a smaller data.batch_size"
                )
            networks[name] = benchmark.summary(network, times)
            del benchmark  # its memory is needed for the next network
            if config.compute.compile:  # PyTorch limits how often it compiles the same class
                torch.compiler.reset()
            if on_gpu:
                torch.cuda.empty_cache()
    if progress:
        progress("", len(networks) * stages, len(networks) * stages)
    return Profile(
        device=torch.cuda.get_device_name(device) if on_gpu else device.type,
        device_memory_bytes=device_memory(device) if on_gpu else None,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        image=images_shape,
        classes=classes,
        precision=config.compute.precision,
        channels_last=config.compute.channels_last,
        compile=config.compute.compile,
        soft_targets=config.data.has_soft_targets,
        accumulate=config.schedule.accumulate,
        networks=networks,
        communication=_communication(config, on_gpu, links),
    )


def _communication(config: Config, on_gpu: bool, links: Communication | None) -> Communication:
    """Return the measured links, or assumed ones, with the bucket size of the reducer."""
    communication = links or (NCCL_NVLINK if on_gpu else GLOO_LOOPBACK)
    update: dict[str, float] = {"bucket_bytes": BUCKET_BYTES}
    if config.coordinator.address == "off":  # the decision needs no message
        update["decision_seconds"] = 0.0
    return communication.model_copy(update=update)


@dataclass(frozen=True)
class Times:
    """Median times of one size in seconds, and the memory kept for backward in bytes."""

    forward: float
    backward: float
    update: float
    kept: int


@dataclass(frozen=True)
class NetworkBenchmark:
    """One network in training, ready to be measured. peers: number of the other networks."""

    learner: Learner
    image: tuple[int, int, int]
    classes: int
    peers: int
    compute: Compute

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return next(self.learner.model.parameters()).device

    def measure(
        self, sizes: Sequence[int], report: Callable[[int], None], memory: int
    ) -> dict[int, Times]:
        """Return the times by shard size, for the sizes that fit into memory and time limits.

        sizes: ascending. report: called with the number of the size before it is measured.
        Repetitions alternate between the sizes, so that other load on the machine affects all
        sizes alike.
        """
        firsts = self._first_steps(sizes, report, memory)
        report(len(sizes))
        steps: dict[int, list[PhaseSeconds]] = {}
        for n, (seconds, _) in firsts.items():
            steps[n] = [seconds] if sum(seconds) > SLOW_SECONDS else []
        repeated = [n for n in steps if not steps[n]]
        end = time.perf_counter() + BUDGET_SECONDS * len(repeated)
        for repetition in range(MAX_REPETITIONS if repeated else 0):
            if repetition >= MIN_REPETITIONS and time.perf_counter() > end:
                break
            for n in list(repeated):
                try:
                    steps[n].append(self._step(n))
                except torch.cuda.OutOfMemoryError:  # noqa: PERF203, another process took memory
                    repeated.remove(n)
                    del firsts[n]
        times = {}
        for n, (_, kept) in firsts.items():
            forward, backward, update = (median(column) for column in zip(*steps[n], strict=True))
            times[n] = Times(forward, backward, update, kept)
        return times

    def _first_steps(
        self, sizes: Sequence[int], report: Callable[[int], None], memory: int
    ) -> dict[int, tuple[PhaseSeconds, int]]:
        """Return, by shard size, the times of a first step and the bytes kept for backward."""
        firsts: dict[int, tuple[PhaseSeconds, int]] = {}
        with suppress(torch.cuda.OutOfMemoryError):
            self._step(sizes[0])  # loads libraries, starts threads
            for stage, n in enumerate(sizes):
                report(stage)
                if firsts and self._exceeds_limits(n / max(firsts), *firsts[max(firsts)], memory):
                    break
                # Eager first: a CUDA graph hides and keeps the memory of its forward pass.
                eager = replace(self, learner=self.learner.eager())
                warm_up(eager.learner, n, self.image, self.compute)
                with kept_by_forward(self.learner.model) as kept:
                    seconds = eager._step(n)
                if self.learner.graphs.captures_model:
                    warm_up(self.learner, n, self.image, self.compute)
                firsts[n] = seconds, sum(kept.values())
        return firsts

    def _exceeds_limits(self, factor: float, seconds: PhaseSeconds, kept: int, memory: int) -> bool:
        """Predict whether a shard `factor` times larger takes too much time or memory.

        Predicting is necessary: an operating system without free memory kills the process.
        """
        needed = sum(self._fixed_bytes()) + kept * factor
        return sum(seconds) * factor > MAX_STEP_SECONDS or needed > memory

    def _fixed_bytes(self) -> tuple[int, int, int]:
        """Return the bytes of weights (with moving average), gradients and optimizer state."""
        models = [m for m in (self.learner.model, self.learner.averaged) if m is not None]
        weights = [w for m in models for w in (*m.parameters(), *m.buffers())]
        gradients = [p.grad for p in self.learner.model.parameters() if p.grad is not None]
        state = [v for s in self.learner.optimizer.state.values() for v in s.values()]
        return (
            sum(w.nbytes for w in weights),
            sum(g.nbytes for g in gradients),
            sum(v.nbytes for v in state if isinstance(v, Tensor)),
        )

    def _step(self, n: int) -> PhaseSeconds:
        """Make one step with `n` samples; return the seconds of its phases."""
        noise = torch.randn(n, *self.image, device=self.device)
        x = in_order(noise, self.compute.channels_last)
        y = torch.randint(self.classes, (n,), device=self.device)
        peers = {
            str(i): torch.randn(n, self.classes, device=self.device) for i in range(self.peers)
        }
        clock = [self._now()]
        z = self.learner.forward(x)
        clock.append(self._now())
        if not self.learner.frozen:
            loss = self.learner.loss(z, y, peers, [Term(peer, 1.0, 1.0) for peer in peers])
            self.learner.backward(loss, 1)
        clock.append(self._now())
        if not self.learner.frozen:
            self.learner.update(1)
        clock.append(self._now())
        forward, backward, update = (b - a for a, b in pairwise(clock))
        return forward, backward, update

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def summary(self, network: Network, times: Mapping[int, Times]) -> NetworkTimes:
        """Return the measurements in the form of the profile."""
        smallest, largest = min(times), max(times)
        parameters, gradients, optimizer = self._fixed_bytes()
        kept = times[largest].kept
        per_sample = kept / largest
        if smallest < largest:
            per_sample = max(kept - times[smallest].kept, 0) / (largest - smallest)
        return NetworkTimes(
            role=network.role,
            model=network.model,
            model_kwargs=network.model_kwargs,
            optimizer=network.optimizer.name,
            frozen=self.learner.frozen,
            cuda_graphs=bool(self.learner.graphs.batch_sizes),
            samples=tuple(times),
            forward_seconds=tuple(t.forward for t in times.values()),
            backward_seconds=tuple(t.backward for t in times.values()),
            update_seconds=median(t.update for t in times.values()),
            parameter_bytes=parameters,
            gradient_bytes=gradients,
            optimizer_bytes=optimizer,
            activation_bytes_per_sample=per_sample,
            activation_bytes_fixed=max(round(kept - per_sample * largest), 0),
        )


def _benchmark(
    config: Config,
    name: str,
    image: tuple[int, int, int],
    classes: int,
    device: torch.device,
) -> NetworkBenchmark:
    """Build a network for measuring; UsageError if it cannot be built or trained."""
    network, (channels, *sides) = config.networks[name], image
    model = registry.build(
        network.model, channels, classes, network.model_kwargs, min(sides), network.output
    )
    registry.check_output(model, network.model, image, classes)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"model {network.model} has no parameter to train")
    # One rank, and an update in every step: the cost model adds the all-reduce between ranks, and
    # divides the cost of an update among the steps that share it.
    learner = make_learner(
        config, name, model, World(Environment(), device), None, AccumulationWindow()
    )
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.0
    return NetworkBenchmark(learner, image, classes, len(config.networks) - 1, config.compute)


@contextmanager
def kept_by_forward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collect the bytes that forward passes in the block keep for backward, by storage address.

    Weights and buffers of `model` are not counted.
    """
    weights = {w.untyped_storage().data_ptr() for w in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
