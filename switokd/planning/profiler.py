"""Measures each network on the device at hand: forward, backward and update by samples.

A network is made ready as for training, with all that its updates do, and fed with noise, in a
fork of the random numbers. Learning rates are 0 here: noise does not spoil what is measured. Times
are on the clock on the wall, from an idle device to an idle device, which is also how a step meets
its exchange.

Not covered: the costs of communication, which are measured between ranks that are there
(`measure_links.py`), else assumed (`profile.py`), and can be set in the file; of compiled networks
all sizes but the smallest and the largest; seconds that compiling takes.
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
from switokd.training.schedules import AccumulationWindow
from switokd.training.warm_up import warm_up

FEWEST, MOST = 3, 30
"""Repetitions per size, after a first step that does not count."""
BUDGET_SECONDS = 0.4
"""Per network and size; slow networks take longer, for they are repeated `FEWEST` times."""
SLOW_SECONDS = 2.0
"""A size whose first step takes longer is measured by this step alone."""
TOO_LONG = 10.0
"""Seconds; a size whose step would take longer is left to extrapolation, but for the smallest."""

Split = tuple[float, float, float]
"""Seconds of forward, backward, update."""
ProgressCall = Callable[[str, int, int], None]
"""(network being measured, stages done, stages in all)."""


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
    """Measure all networks of `config` at `sizes` samples on `device`.

    images_shape: channels, height, width. links: what communication costs, None: assumed. memory:
    bytes that a network may take, None: as many as the device has. A size that needs more, or
    takes too long, is left out, but for the smallest. UsageError if a network cannot be built or
    none of its sizes fits.
    """
    sizes, memory = sorted(set(sizes)), memory or device_memory(device)
    if config.compute.compile:  # which takes a while for each
        sizes = sorted({sizes[0], sizes[-1]})
    stages, on_gpu = len(sizes) + 1, device.type == "cuda"
    networks = {}
    with torch.random.fork_rng(devices=[device] if on_gpu else []), tf32(config.compute):
        for i, (name, network) in enumerate(config.networks.items()):

            def tell(stage: int, name: str = name, before: int = i * stages) -> None:
                if progress:
                    progress(name, before + stage, len(config.networks) * stages)

            bench = _bench(config, name, images_shape, classes, device)
            times = bench.measure(sizes, tell, memory)
            if not times:
                raise UsageError(
                    f"network {name} ({network.model}) does not fit into the memory of {device} "
                    f"with {sizes[0]} images; choose a smaller data.batch_size"
                )
            networks[name] = bench.summary(network, times)
            del bench
            if config.compute.compile:  # PyTorch compiles a class's networks so many times only
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
    """Give the constants, measured or assumed; without a coordinator no decision travels."""
    assumed = links or (NCCL_NVLINK if on_gpu else GLOO_LOOPBACK)
    if config.coordinator.address == "off":
        return assumed.model_copy(update={"decision_seconds": 0.0})
    return assumed


@dataclass(frozen=True)
class Times:
    """Medians of one size, in seconds, and what forward kept, in bytes."""

    forward: float
    backward: float
    update: float
    kept: int


@dataclass(frozen=True)
class Bench:
    """One network as it trains, ready to be measured."""

    learner: Learner
    image: tuple[int, int, int]
    classes: int
    peers: int
    compute: Compute

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.learner.model.parameters()).device

    def measure(
        self, sizes: Sequence[int], tell: Callable[[int], None], memory: int
    ) -> dict[int, Times]:
        """Times by samples, of the sizes (ascending) that fit into `memory` and into `TOO_LONG`.

        The sizes take turns, so that a machine that is busy for a while is so for all of them.
        """
        firsts = self._first_steps(sizes, tell, memory)
        tell(len(sizes))
        runs: dict[int, list[Split]] = {}
        for n, (split, _) in firsts.items():
            runs[n] = [split] if sum(split) > SLOW_SECONDS else []
        turns = [n for n in runs if not runs[n]]
        end = time.perf_counter() + BUDGET_SECONDS * len(turns)
        for turn in range(MOST if turns else 0):
            if turn >= FEWEST and time.perf_counter() > end:
                break
            for n in list(turns):
                try:
                    runs[n].append(self._step(n))
                except torch.cuda.OutOfMemoryError:  # noqa: PERF203, a neighbour there has grown
                    turns.remove(n)
                    del firsts[n]
        times = {}
        for n, (_, kept) in firsts.items():
            forward, backward, update = (median(column) for column in zip(*runs[n], strict=True))
            times[n] = Times(forward, backward, update, kept)
        return times

    def _first_steps(
        self, sizes: Sequence[int], tell: Callable[[int], None], memory: int
    ) -> dict[int, tuple[Split, int]]:
        """By samples: a first step's times, and the bytes that its forward kept."""
        found: dict[int, tuple[Split, int]] = {}
        with suppress(torch.cuda.OutOfMemoryError):
            self._step(sizes[0])  # libraries load, threads start
            for stage, n in enumerate(sizes):
                tell(stage)
                if found and self._is_too_much(n / max(found), *found[max(found)], memory):
                    break
                # Eager first: a recording shows nothing, and keeps the memory that it takes.
                usual = replace(self, learner=self.learner.eager())
                warm_up(usual.learner, n, self.image, self.compute)
                with kept_by_forward(self.learner.model) as kept:
                    split = usual._step(n)
                if self.learner.is_graphed:
                    warm_up(self.learner, n, self.image, self.compute)
                found[n] = split, sum(kept.values())
        return found

    def _is_too_much(self, times: float, split: Split, kept: int, memory: int) -> bool:
        """Whether a shard so many times larger would take too long, or too much memory.

        A system without memory left kills a process, and says nothing before: see first.
        """
        needed = sum(self._fixed_bytes()) + kept * times
        return sum(split) * times > TOO_LONG or needed > memory

    def _fixed_bytes(self) -> tuple[int, int, int]:
        """Of weights with their moving average, of gradients, of the optimizer's state."""
        kept_models = [m for m in (self.learner.model, self.learner.averaged) if m is not None]
        weights = [w for m in kept_models for w in (*m.parameters(), *m.buffers())]
        gradients = [p.grad for p in self.learner.model.parameters() if p.grad is not None]
        state = [v for s in self.learner.optimizer.state.values() for v in s.values()]
        return (
            sum(w.nbytes for w in weights),
            sum(g.nbytes for g in gradients),
            sum(v.nbytes for v in state if isinstance(v, Tensor)),
        )

    def _step(self, n: int) -> Split:
        """Seconds of forward, backward with loss, and update, with `n` samples."""
        noise = torch.randn(n, *self.image, device=self.device)
        x = in_order(noise, self.compute.channels_last)
        y = torch.randint(self.classes, (n,), device=self.device)
        peers = {
            str(i): torch.randn(n, self.classes, device=self.device) for i in range(self.peers)
        }
        marks = [self._now()]
        z = self.learner.forward(x)
        marks.append(self._now())
        if not self.learner.frozen:
            loss = self.learner.loss(z, y, peers, [Term(peer, 1.0, 1.0) for peer in peers])
            self.learner.backward(loss, 1)
        marks.append(self._now())
        if not self.learner.frozen:
            self.learner.update(1)
        marks.append(self._now())
        forward, backward, update = (b - a for a, b in pairwise(marks))
        return forward, backward, update

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def summary(self, network: Network, times: Mapping[int, Times]) -> NetworkTimes:
        """Give all that was measured, as the profile keeps it."""
        least, most = min(times), max(times)
        parameters, gradients, optimizer = self._fixed_bytes()
        kept = times[most].kept
        per_sample = kept / most
        if least < most:
            per_sample = max(kept - times[least].kept, 0) / (most - least)
        return NetworkTimes(
            role=network.role,
            model=network.model,
            model_kwargs=network.model_kwargs,
            optimizer=network.optimizer.name,
            frozen=self.learner.frozen,
            recorded=bool(self.learner.graphed_models),
            samples=tuple(times),
            forward_seconds=tuple(t.forward for t in times.values()),
            backward_seconds=tuple(t.backward for t in times.values()),
            update_seconds=median(t.update for t in times.values()),
            parameter_bytes=parameters,
            gradient_bytes=gradients,
            optimizer_bytes=optimizer,
            activation_bytes_per_sample=per_sample,
            activation_bytes_fixed=max(round(kept - per_sample * most), 0),
        )


def _bench(
    config: Config,
    name: str,
    image: tuple[int, int, int],
    classes: int,
    device: torch.device,
) -> Bench:
    network, (channels, *sides) = config.networks[name], image
    model = registry.build(network.model, channels, classes, network.model_kwargs, min(sides))
    registry.check_output(model, network.model, image, classes)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"model {network.model} has no parameter to train")
    # On its own and with an update in every step, whatever the run file says: the planner adds
    # what other ranks cost, and shares an update's costs among its steps.
    learner = make_learner(
        config, name, model, World(Environment(), device), None, AccumulationWindow()
    )
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.0
    return Bench(learner, image, classes, len(config.networks) - 1, config.compute)


@contextmanager
def kept_by_forward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes that forward keeps for backward inside, by memory; the weights are not counted."""
    own = {w.untyped_storage().data_ptr() for w in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
