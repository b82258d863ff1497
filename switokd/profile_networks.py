"""Measures each network on the device at hand: forward, backward and update by samples.

A network is built as for training and fed with noise, in a fork of the random numbers, so that a
training afterwards draws what it would have drawn. Learning rates are 0 here: noise does not
spoil what is measured. Times are on the clock on the wall, from an idle device to an idle device,
which is also how a step meets its exchange.

Not covered: torch.compile (measured without); the costs of communication, which are assumed
(`timings.py`) and can be set in the saved file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from switokd import models
from switokd.config import Config, Network
from switokd.errors import UsageError
from switokd.objective import objective
from switokd.timings import GLOO_LOOPBACK, NCCL_NVLINK, Communication, NetworkTimes, Profile

WARM_UP = 2
FEWEST, MOST = 3, 30
"""Repetitions that count, per size."""
BUDGET_SECONDS = 0.4
"""Per network and size; slow networks take longer, for they are repeated `FEWEST` times."""
SLOW_SECONDS = 2.0
"""A first step that takes longer is warm-up enough, and once is enough to measure it."""

ProgressCall = Callable[[str, int, int], None]
"""(network being measured, sizes done, sizes in all)."""


def profile(
    config: Config,
    images_shape: tuple[int, int, int],
    classes: int,
    device: torch.device,
    sizes: Sequence[int],
    progress: ProgressCall | None = None,
) -> Profile:
    """Measure all networks of `config` at `sizes` samples on `device`.

    images_shape: channels, height, width. A size that does not fit into the device's memory is
    left out. UsageError if a network cannot be built or none of its sizes fits.
    """
    sizes = sorted(set(sizes))
    done, networks = 0, {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _tf32(config):
        for name, network in config.networks.items():
            bench = _bench(config, network, images_shape, classes, device)
            times = []
            for n in sizes:
                if progress:
                    progress(name, done, len(config.networks) * len(sizes))
                measured = bench.measure(n)
                done += 1
                if measured is None:
                    done += len(sizes) - sizes.index(n) - 1
                    break
                times.append(measured)
            if not times:
                raise UsageError(
                    f"network {name} ({network.model}) does not fit into the memory of {device} "
                    f"with {sizes[0]} images; choose a smaller data.batch_size"
                )
            networks[name] = bench.summary(network, sizes[: len(times)], times)
            del bench
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if progress:
        progress("", done, done)
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return Profile(
        device=properties.name if properties else device.type,
        device_memory_bytes=properties.total_memory if properties else None,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        image=images_shape,
        classes=classes,
        networks=networks,
        communication=_communication(config, on_gpu),
    )


def _communication(config: Config, on_gpu: bool) -> Communication:
    """Give the constants that are assumed; no decision travels where every rank makes it."""
    assumed = NCCL_NVLINK if on_gpu else GLOO_LOOPBACK
    if config.coordinator.address == "off":
        return assumed.model_copy(update={"decision_seconds": 0.0})
    return assumed


@dataclass(frozen=True)
class Times:
    """Medians, in seconds, and what forward kept, in bytes."""

    forward: float
    backward: float
    update: float
    kept: int


@dataclass(frozen=True)
class Bench:
    """One network, ready to be measured."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    image: tuple[int, int, int]
    classes: int
    peers: int
    device: torch.device
    bf16: bool
    channels_last: bool

    def measure(self, n: int) -> Times | None:
        """Times with `n` samples; None if they do not fit into the device's memory."""
        try:
            return self._measure(n)
        except torch.cuda.OutOfMemoryError:
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            return None

    def _measure(self, n: int) -> Times:
        x = torch.randn(n, *self.image, device=self.device)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        y = torch.randint(self.classes, (n,), device=self.device)
        peers = {
            str(i): torch.randn(n, self.classes, device=self.device) for i in range(self.peers)
        }
        with _kept(self.model) as kept:
            is_slow = sum(self._step(x, y, peers)) > SLOW_SECONDS
        for _ in range(0 if is_slow else WARM_UP - 1):
            self._step(x, y, peers)
        fewest = 1 if is_slow else FEWEST
        runs: list[tuple[float, float, float]] = []
        end = time.perf_counter() + BUDGET_SECONDS
        while len(runs) < fewest or (len(runs) < MOST and time.perf_counter() < end):
            runs.append(self._step(x, y, peers))
        forward, backward, update = (median(column) for column in zip(*runs, strict=True))
        return Times(forward, backward, update, sum(kept.values()))

    def _step(self, x: Tensor, y: Tensor, peers: dict[str, Tensor]) -> tuple[float, float, float]:
        """Seconds of forward, backward with loss, and update."""
        self.optimizer.zero_grad()
        marks = [self._now()]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            z = self.model(x)
        marks.append(self._now())
        z = z.float()
        loss = objective(z, y, peers, dict.fromkeys(peers, 1.0), 1.0)
        loss.backward()  # type: ignore[no-untyped-call]
        marks.append(self._now())
        self.optimizer.step()
        marks.append(self._now())
        forward, backward, update = (b - a for a, b in pairwise(marks))
        return forward, backward, update

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def summary(
        self, network: Network, sizes: Sequence[int], times: Sequence[Times]
    ) -> NetworkTimes:
        """Give all that was measured, as the profile keeps it."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        kept = times[-1].kept
        per_sample = kept / sizes[-1]
        if len(sizes) > 1:
            per_sample = max(kept - times[0].kept, 0) / (sizes[-1] - sizes[0])
        return NetworkTimes(
            role=network.role,
            model=network.model,
            samples=tuple(sizes),
            forward_seconds=tuple(t.forward for t in times),
            backward_seconds=tuple(t.backward for t in times),
            update_seconds=median(t.update for t in times),
            parameter_bytes=sum(w.nbytes for w in weights),
            gradient_bytes=sum(p.nbytes for p in self.model.parameters() if p.requires_grad),
            optimizer_bytes=sum(v.nbytes for v in state if isinstance(v, Tensor)),
            activation_bytes_per_sample=per_sample,
            activation_bytes_fixed=max(round(kept - per_sample * sizes[-1]), 0),
        )


def _bench(
    config: Config,
    network: Network,
    image: tuple[int, int, int],
    classes: int,
    device: torch.device,
) -> Bench:
    model = models.build(network.model, image[0], classes, network.model_kwargs)
    models.check_output(model, network.model, image, classes)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"model {network.model} has no parameter to train")
    compute = getattr(config, "compute", None)
    channels_last = bool(getattr(compute, "channels_last", False))
    model = model.to(device).train()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    fused = {"fused": True} if getattr(compute, "fused_optimizer", False) else {}
    return Bench(
        model=model,
        optimizer=_optimizer(network, model, fused),
        image=image,
        classes=classes,
        peers=len(config.networks) - 1,
        device=device,
        bf16=getattr(compute, "precision", "") == "bf16",
        channels_last=channels_last,
    )


def _optimizer(network: Network, model: nn.Module, more: dict[str, Any]) -> torch.optim.Optimizer:
    """The run file's optimizer, at a learning rate of 0."""
    settings = {**network.optimizer.model_dump(exclude={"name"}), "lr": 0.0, **more}
    kind = torch.optim.Adam if network.optimizer.name == "adam" else torch.optim.SGD
    return kind(model.parameters(), **settings)


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[int, int]]:
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


@contextmanager
def _tf32(config: Config) -> Iterator[None]:
    """Matrix products in TF32 inside, where the run file says so."""
    before = torch.get_float32_matmul_precision()
    if getattr(getattr(config, "compute", None), "precision", "") == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
