"""Building what a rank trains: its networks, their optimizers, their gradients' groups.

Not covered: the loop (`trainer.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import torch
from torch.distributed import ProcessGroup

from switokd.config.config import Config
from switokd.config.sections import Compute, Network
from switokd.data.augment import mix_one, seeding
from switokd.data.images import Images
from switokd.distillation.topology import Role
from switokd.errors import UsageError
from switokd.models import registry
from switokd.runtime.placement import LocalPlacement, Placement
from switokd.runtime.process_group import World
from switokd.training.batch_norm import check_batch_norm
from switokd.training.cuda_graphs import (
    GraphedFunctions,
    can_capture,
)
from switokd.training.ema import moving_average
from switokd.training.learner import Learner
from switokd.training.optimizer import (
    AUTOCAST,
    OptimizerStep,
    loss_scaler,
    parameter_groups,
)
from switokd.training.reducer import GradientReducer
from switokd.training.schedules import AccumulationWindow, learning_rate
from switokd.training.timer import Timer
from switokd.training.warm_up import compiled, warm_up

Models = Mapping[str, torch.nn.Module]
"""By name; on the CPU, with their first weights."""


def make_models(config: Config, names: Iterable[str], images: Images) -> Models:
    """Build networks; UsageError if one cannot be made or does not fit the data."""
    return {name: make_model(config, name, images) for name in names}


def make_model(config: Config, name: str, images: Images) -> torch.nn.Module:
    """Build one network; its first weights depend on (seed, name) alone, or are given.

    Whatever its builder draws from, torch, numpy or random: each rank comes to the same.
    """
    network = config.networks[name]
    key = key_of(config, name)
    torch.manual_seed(key % 2**63)
    try:
        channels, *sides = images.shape
        with seeding() as seed:
            seed(key)
            model = registry.build(
                network.model, channels, images.classes, network.model_kwargs, min(sides)
            )
            registry.check_output(model, network.model, images.shape, images.classes)
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(f"model {network.model} has no parameter to train")
        if network.weights is not None:
            registry.load_weights(model, Path(network.weights), f"networks.{name}.weights")
    except UsageError as error:
        error.seen_by_every_rank = False  # the other ranks build other networks
        raise
    return model


def key_of(config: Config, name: str) -> int:
    """What a network draws from, of the run's seed and its name."""
    return mix_one(config.seed, crc32(name.encode()))


def make_learners(
    config: Config,
    place: LocalPlacement,
    built: Models,
    world: World,
    images: Images,
    windows: AccumulationWindow | None = None,
) -> list[Learner]:
    """All networks of this rank, for a training on `images`.

    windows: which steps share an update; None: each has its own. Every rank must call it: groups
    are made together.
    """
    ranks_of = {name: place.placement.ranks_of(name) for name in config.topology}
    by_ranks = {ranks: world.group(ranks) for ranks in dict.fromkeys(ranks_of.values())}
    groups = {name: by_ranks[ranks] for name, ranks in ranks_of.items()}
    check_batch_norm(config, place.placement, world)
    learners = [
        make_learner(
            config, name, built[name], world, groups[name], windows or AccumulationWindow()
        )
        for name in place.networks
    ]
    batches = {images.size_of(0), images.size_of(images.steps_per_epoch - 1)}
    for learner in learners:
        shards = [place.shard(learner.name, n) for n in batches]
        for samples in sorted({shard.stop - shard.start for shard in shards} - {0}):
            warm_up(learner, samples, images.shape, config.compute)
    world.all_gather(None)  # networks take unequally long, and steps do not wait for long
    return learners


def make_learner(
    config: Config,
    name: str,
    model: torch.nn.Module,
    world: World,
    group: ProcessGroup | None,
    windows: AccumulationWindow,
) -> Learner:
    """One network with its optimizer, on this rank's device. `group`: its ranks, if several."""
    role = config.topology.role(name)
    if world.device.type == "cuda":
        wake_backward(world.device)
    frozen = config.method.strategy.frozen_teachers and role is Role.TEACHER
    model = prepare(model, config.compute, world.device)
    decay, average = config.schedule.ema_decay, None
    if decay is not None and not frozen:  # before the model knows of groups, which have no copy
        average = moving_average(name, model, decay)
    precision = config.compute.precision
    if config.compute.batch_norm == "sync" and group is not None:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, group)  # type: ignore[no-untyped-call]
    if frozen:
        model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(config.networks[name], model, config.compute.fused_optimizer)
    return Learner(
        name=name,
        role=role,
        model=model,
        network=compiled(model) if config.compute.compile else model,
        optimizer=optimizer,
        gradients=GradientReducer(name, parameters, group, world.transport),
        frozen=frozen,
        key=key_of(config, name),
        low=AUTOCAST.get(precision),
        is_graphed=can_capture(world.device) and config.wants_cuda_graphs(name),
        graphed_functions=make_graphed_functions(config.compute, world.device),
        updates=OptimizerStep(
            windows,
            config.networks[name].clip_norm,
            loss_scaler(world.device) if precision == "fp16" and not frozen else None,
            average,
        ),
        learning=Timer(world.device),
    )


def wake_backward(device: torch.device) -> None:
    """Let PyTorch's thread for backward find the GPU: cuBLAS warns where it is the first to."""
    torch.zeros((), device=device, requires_grad=True).mul(2).backward()  # type: ignore[no-untyped-call]


def make_graphed_functions(compute: Compute, device: torch.device) -> GraphedFunctions:
    """What records functions of tensors, where the run file and the device allow it."""
    return GraphedFunctions(
        device if compute.cuda_graphs is not False and can_capture(device) else None
    )


def prepare(model: torch.nn.Module, compute: Compute, device: torch.device) -> torch.nn.Module:
    """Bring a model into the form that it computes in."""
    model = model.to(device).train()
    if compute.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def make_optimizer(
    network: Network, model: torch.nn.Module, fused: bool = False
) -> torch.optim.Optimizer:
    """The run file's optimizer over all of the model's parameters."""
    settings = network.optimizer.model_dump(exclude={"name", "decay_norms_and_biases"})
    groups = parameter_groups(model, network.optimizer.decay_norms_and_biases)
    by_name = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    make = by_name[network.optimizer.name]
    optimizer: torch.optim.Optimizer = make(groups, **settings, fused=fused or None)
    return optimizer


@contextmanager
def tf32(compute: Compute) -> Iterator[None]:
    """Matrix products in TF32 inside, where the run file says so; then as they were."""
    if compute.precision != "tf32":
        yield
        return
    backends = [
        b.matmul for b in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(b, "matmul")
    ]
    newer = [(b, b.fp32_precision) for b in backends if hasattr(b, "fp32_precision")]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by PyTorch's newer interface, and has no one name
        before = "highest"
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, precision in newer:  # the older one leaves its own there
            backend.fp32_precision = precision


def set_learning_rate(config: Config, learner: Learner, step: int, steps_per_epoch: int) -> None:
    """Set what the schedule says for `step`; a paused teacher's goes on like the others'."""
    base = config.networks[learner.name].optimizer.lr
    rate = learning_rate(config.schedule, base, step, steps_per_epoch)
    for group in learner.optimizer.param_groups:
        group["lr"] = rate


def check_shards(config: Config, placement: Placement, images: Images) -> None:
    """UsageError if a batch is too small to give each rank two samples or more.

    The last batch of an epoch may leave a rank none, but not where BatchNorm waits for it.
    """
    batch_size, last = images.size_of(0), images.size_of(images.steps_per_epoch - 1)
    all_there_are = "" if batch_size == config.data.batch_size else ", all that there are,"
    if problem := placement.problem_with(batch_size, all_there_are):
        raise UsageError(problem)
    for name in placement.networks:
        last_shards = placement.shards(name, last).values()
        if config.compute.batch_norm == "sync" and not all(s.stop > s.start for s in last_shards):
            raise UsageError(
                f"compute.batch_norm: sync, but an epoch's last batch of {last} images leaves a "
                f"rank of {placement.whose(name)} none; use data.drop_last=true"
            )
