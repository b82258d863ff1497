"""Building what a rank trains: its networks, their optimizers, their gradients' groups.

Not covered: the loop (`trainer.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from zlib import crc32

import torch
from torch.distributed import ProcessGroup

from switokd import models
from switokd.config import Compute, Config, Network
from switokd.data import Images
from switokd.data.augment import mix
from switokd.errors import UsageError
from switokd.gradients import Gradients
from switokd.learner import Learner
from switokd.placement import Place, Placement
from switokd.stopwatch import Stopwatch
from switokd.strategy import STRATEGIES
from switokd.topology import Role
from switokd.world import World

Models = Mapping[str, torch.nn.Module]
"""By name; on the CPU, with their first weights."""


def make_models(config: Config, names: Iterable[str], images: Images) -> Models:
    """Build networks; UsageError if one cannot be made or does not fit the data."""
    return {name: make_model(config, name, images) for name in names}


def make_model(config: Config, name: str, images: Images) -> torch.nn.Module:
    """Build one network; its first weights depend on (seed, name) alone."""
    network = config.networks[name]
    torch.manual_seed(int(mix(config.seed, crc32(name.encode()))) % 2**63)
    try:
        model = models.build(network.model, images.shape[0], images.classes, network.model_kwargs)
        models.check_output(model, network.model, images.shape, images.classes)
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(f"model {network.model} has no parameter to train")
    except UsageError as error:
        error.seen_by_every_rank = False  # the other ranks build other networks
        raise
    return model


def make_learners(config: Config, place: Place, built: Models, world: World) -> list[Learner]:
    """All networks of this rank. Every rank must call it: groups are made together."""
    groups = {name: world.group(place.placement.ranks_of(name)) for name in config.topology}
    check_batch_norm(config, place.placement, world)
    if config.compute.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    learners = [
        make_learner(config, name, built[name], world, groups[name]) for name in place.networks
    ]
    # From here on ranks draw (dropout) independently of each other.
    torch.manual_seed(int(mix(config.seed, place.rank + 1)) % 2**63)
    return learners


def make_learner(
    config: Config, name: str, model: torch.nn.Module, world: World, group: ProcessGroup | None
) -> Learner:
    """One network with its optimizer, on this rank's device. `group`: its ranks, if several."""
    distillation, role = config.distillation, config.topology.role(name)
    model = prepare(model, config.compute, world.device)
    if config.compute.batch_norm == "sync" and group is not None:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, group)  # type: ignore[no-untyped-call]
    strategy = STRATEGIES[distillation.strategy]
    weight = distillation.alpha if role is Role.STUDENT else distillation.beta
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Learner(
        name=name,
        role=role,
        model=model,
        network=torch.compile(model) if config.compute.compile else model,
        optimizer=make_optimizer(config.networks[name], model, config.compute.fused_optimizer),
        gradients=Gradients(name, parameters, group, world.transport),
        kl_weights=partial(strategy.kl_weights, name, config.topology, weight=weight),
        bf16=config.compute.precision == "bf16",
        learning=Stopwatch(world.device),
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
    settings = network.optimizer.model_dump(exclude={"name"})
    if network.optimizer.name == "adam":
        return torch.optim.Adam(model.parameters(), **settings, fused=fused)
    return torch.optim.SGD(model.parameters(), **settings, fused=fused)


def set_learning_rate(config: Config, learner: Learner, epoch: int) -> None:
    """Multi-step schedule by epochs begun; a paused teacher's goes on like the others'."""
    passed = sum(epoch >= milestone for milestone in config.schedule.milestones)
    for group in learner.optimizer.param_groups:
        base = config.networks[learner.name].optimizer.lr
        group["lr"] = base * config.schedule.gamma**passed


def check_batch_norm(config: Config, placement: Placement, world: World) -> None:
    """UsageError if statistics over several ranks are asked for where PyTorch has none."""
    shared = [name for name in placement.networks if len(placement.ranks_of(name)) > 1]
    if config.compute.batch_norm == "sync" and shared and world.backend != "nccl":
        raise UsageError(
            f"compute.batch_norm: sync needs a GPU of its own for each rank of {shared[0]}; use "
            "batch_norm=rank, or one rank per network"
        )


def check_shards(placement: Placement, batch_size: int) -> None:
    """UsageError if a batch is too small to give each rank two samples or more."""
    for name in placement.networks:
        shards = placement.shards(name, batch_size)
        if len(shards) > 1 and min(s.stop - s.start for s in shards.values()) < 2:
            raise UsageError(
                f"data.batch_size: {batch_size} images leave a rank of {placement.whose(name)} "
                "fewer than 2; use a larger batch, or fewer ranks for this network"
            )
