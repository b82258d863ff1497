"""Builds the networks of one rank, with their optimizers and process groups.

Not covered: the training loop (`trainer.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from zlib import crc32

import torch
from torch.distributed import ProcessGroup

from switokd.config.config import Config
from switokd.config.sections import Compute, Network
from switokd.data.augment import mix_one, seeding
from switokd.data.images import Images
from switokd.distillation.topology import Role
from switokd.errors import OwnCodeError, UsageError
from switokd.models import registry
from switokd.models.given_weights import load_weights
from switokd.models.own_state import check_own_state
from switokd.runtime.durable import check_sum
from switokd.runtime.placement import LocalPlacement, Placement
from switokd.runtime.process_group import World
from switokd.runtime.waiting import waiting
from switokd.training import eager
from switokd.training.batch_norm import check_batch_norm
from switokd.training.cuda_graphs import GraphContext, NetworkGraphs, can_capture
from switokd.training.ema import moving_average
from switokd.training.input_guard import InputGuard
from switokd.training.learner import ForwardPass, Learner
from switokd.training.micro_batches import MeanBuffers, TreeReducer
from switokd.training.optimizer import (
    AUTOCAST_DTYPES,
    OptimizerStep,
    loss_scaler,
    parameter_groups,
)
from switokd.training.reducer import GradientReducer
from switokd.training.schedules import AccumulationWindow, learning_rate
from switokd.training.timer import Timer
from switokd.training.warm_up import compile_model, warm_up

Models = Mapping[str, torch.nn.Module]
"""Models by network name, on the CPU, with their initial weights."""


OnLoaded = Callable[[str, str], object]
"""Called with a network's name and, in one line, which weights of a file were loaded."""


def make_models(
    config: Config,
    names: Iterable[str],
    images: Images,
    on_loaded: OnLoaded = lambda name, line: None,
) -> Models:
    """Build the models of several networks; see `make_model`."""
    models: dict[str, torch.nn.Module] = {}
    for name in names:
        models[name] = make_model(config, name, images, models, on_loaded)
    return models


def make_model(
    config: Config,
    name: str,
    images: Images,
    others: Models = MappingProxyType({}),
    on_loaded: OnLoaded = lambda name, line: None,
) -> torch.nn.Module:
    """Build a network's model with its initial weights, or load the weights that config names.

    Initial weights depend on the run's seed and the network's name alone: the generators of torch,
    numpy and random are seeded, so all ranks build the same weights. others: the models that this
    process has built before; they share no memory with the new one.
    UsageError if the model cannot be built or does not fit the images, or shares parameters.
    """
    network = config.networks[name]
    network_seed = seed_of(config, name)
    torch.manual_seed(network_seed % 2**63)
    try:
        channels, *sides = images.shape
        with waiting(f"{name} ({network.model}) to be built"), seeding() as seed:
            seed(network_seed)
            model = registry.build(
                network.model,
                channels,
                images.classes,
                network.model_kwargs,
                min(sides),
                network.output,
            )
            # A lazy module has its parameters once it has seen images.
            registry.check_output(model, network.model, images.shape, images.classes)
            separate(model, f"model {network.model}", others)
            check_own_state(model, f"network {name}")
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(f"model {network.model} has no parameter to train")
        if network.weights is not None:
            check_sum(Path(network.weights))
            line = load_weights(
                model,
                Path(network.weights),
                f"networks.{name}.weights",
                network.weights_key,
                images.classes,
                network.fresh_classifier,
            )
            on_loaded(name, line)
    except UsageError as error:  # the other ranks build other networks
        if not isinstance(error, OwnCodeError):  # which begins with the place in the user's file
            error = error.under(f"networks.{name}")
        raise error.seen_by(every_rank=False) from error.__cause__
    return model


def separate(model: torch.nn.Module, what: str, others: Models) -> None:
    """Give a model its own buffers; UsageError if it has parameters of another network.

    The user's code may use one tensor or module for several networks. On other ranks these are
    copies. what: names the model in the error.
    """
    taken = {
        tensor.untyped_storage().data_ptr(): name
        for name, other in others.items()
        for tensor in (*other.parameters(), *other.buffers())
        if tensor.numel()
    }
    for key, parameter in model.named_parameters():
        if name := taken.get(parameter.untyped_storage().data_ptr()):
            raise UsageError(
                f"{what} has the parameter {key} of network {name}; each call must make a new "
                "module, with parameters of its own"
            )
    own: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.untyped_storage().data_ptr() in taken:
                module._buffers[key] = own.setdefault(id(buffer), buffer.clone())


def seed_of(config: Config, name: str) -> int:
    """Return the seed of a network's random numbers, from the run's seed and its name."""
    return mix_one(config.seed, crc32(name.encode()))


def make_learners(
    config: Config,
    local_placement: LocalPlacement,
    models: Models,
    world: World,
    images: Images,
    window: AccumulationWindow | None = None,
    graph_context: GraphContext | None = None,
) -> list[Learner]:
    """Build the learners of this rank's networks, ready for the first step.

    window: the steps that share an optimizer step; None: every step has its own. graph_context:
    where CUDA graphs are captured; None: where the run file and the device allow it. Every rank
    must call this, because process groups are created together.
    """
    placement = local_placement.placement
    ranks_of = {name: placement.ranks_of(name) for name in config.topology}
    group_of = {ranks: world.group(ranks) for ranks in dict.fromkeys(ranks_of.values())}
    check_batch_norm(config, placement, world)
    count = placement.micro_batches
    each = {name: count // len(ranks_of[name]) if count > 1 else None for name in ranks_of}
    window = window or AccumulationWindow()
    graph_context = graph_context or make_graph_context(config.compute, world.device)
    learners = [
        make_learner(
            config,
            name,
            models[name],
            world,
            group_of[ranks_of[name]],
            window,
            graph_context,
            each[name],
        )
        for name in local_placement.networks
    ]
    batch_sizes = {images.size_of(0), images.size_of(images.steps_per_epoch - 1)}
    for learner in learners:
        parts = [part for n in batch_sizes for part in local_placement.parts(learner.name, n)]
        for samples in sorted({part.stop - part.start for part in parts} - {0}):
            warm_up(learner, samples, images.shape, config.compute)
    # Ranks build for unequal times, and the collectives of a step have a short timeout.
    world.all_gather(None)
    return learners


def make_learner(
    config: Config,
    name: str,
    model: torch.nn.Module,
    world: World,
    group: ProcessGroup | None,
    window: AccumulationWindow,
    graph_context: GraphContext | None = None,
    micro_batches: int | None = None,
) -> Learner:
    """Build one network's learner on this rank's device; see `make_learners`.

    group: the network's ranks; None: this rank alone. micro_batches: how many of a batch this rank
    computes; None: its shard is computed at once.
    """
    compute, role, device = config.compute, config.topology.role(name), world.device
    if device.type == "cuda":
        init_cuda_on_autograd_thread(device)
    frozen = config.method.strategy.frozen_teachers and role is Role.TEACHER
    model = to_compute_format(model, compute, device)
    decay, average = config.schedule.ema_decay, None
    if decay is not None and not frozen:  # before SyncBatchNorm, whose group cannot be copied
        average = moving_average(name, model, decay)
    if compute.batch_norm == "sync" and group is not None:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, group)  # type: ignore[no-untyped-call]
    parameters = [p for p in model.parameters() if p.requires_grad]
    buffers: MeanBuffers | None = None
    if micro_batches is None:
        reducer = GradientReducer(name, parameters, group, world.transport)
    else:
        reducer = TreeReducer(name, parameters, micro_batches, group, world.transport)
        buffers = MeanBuffers(name, None if frozen else model, group, world.transport)
    if frozen:
        model.eval()
    captures_model = can_capture(device) and config.wants_cuda_graphs(name)
    return Learner(
        name=name,
        role=role,
        model=model,
        forward_pass=ForwardPass(
            compile_model(model) if compute.compile else model,
            AUTOCAST_DTYPES.get(compute.precision),
            frozen,
            seed_of(config, name),
            InputGuard(name, warns=group is None or group.rank() == 0),
        ),
        optimizer_step=OptimizerStep(
            make_optimizer(config.networks[name], model, compute.fused_optimizer),
            reducer,
            window,
            config.networks[name].clip_norm,
            loss_scaler(device) if compute.precision == "fp16" and not frozen else None,
            average,
        ),
        graphs=NetworkGraphs(graph_context or make_graph_context(compute, device), captures_model),
        timer=Timer(device),
        buffers=buffers,
    )


def init_cuda_on_autograd_thread(device: torch.device) -> None:
    """Initialise CUDA on PyTorch's autograd thread; otherwise cuBLAS warns in the first step."""
    torch.zeros((), device=device, requires_grad=True).mul(2).backward()  # type: ignore[no-untyped-call]


def make_graph_context(compute: Compute, device: torch.device) -> GraphContext:
    """Return a graph context that captures if both the run file and the device allow it."""
    # A captured loss is overwritten by that of the next micro-batch.
    wants = compute.cuda_graphs is not False and compute.micro_batches == 1
    captures = wants and can_capture(device)
    return GraphContext(device if captures else None)


def to_compute_format(
    model: torch.nn.Module, compute: Compute, device: torch.device
) -> torch.nn.Module:
    """Move a model to `device` and into the memory format of `compute`, in train mode."""
    # What these methods return is not used: a model's own `train` may forget to return the model.
    model.to(device)
    model.train()
    if compute.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def make_optimizer(
    network: Network, model: torch.nn.Module, fused: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of the run file's `network` section for all parameters of `model`."""
    settings = network.optimizer.model_dump(exclude={"name", "decay_norms_and_biases"})
    groups = parameter_groups(model, network.optimizer.decay_norms_and_biases)
    by_name = {"sgd": eager.EagerSGD, "adam": eager.EagerAdam, "adamw": eager.EagerAdamW}
    make = by_name[network.optimizer.name]
    optimizer: torch.optim.Optimizer = make(groups, **settings, fused=fused or None)
    return optimizer


@contextmanager
def tf32(compute: Compute) -> Iterator[None]:
    """Compute float32 matrix products in TF32 inside, if compute.precision=tf32.

    PyTorch's settings are restored afterwards.
    """
    if compute.precision != "tf32":
        yield
        return
    backends = [
        b.matmul for b in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(b, "matmul")
    ]
    precisions = [(b, b.fp32_precision) for b in backends if hasattr(b, "fp32_precision")]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set with PyTorch's newer interface to a value without a name here
        before = "highest"
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, precision in precisions:  # the line above overwrites these values
            backend.fp32_precision = precision


def set_learning_rate(config: Config, learner: Learner, step: int, steps_per_epoch: int) -> None:
    """Set the schedule's learning rate for `step`; a pause does not delay the schedule."""
    base = config.networks[learner.name].optimizer.lr
    rate = learning_rate(config.schedule, base, step, steps_per_epoch)
    for group in learner.optimizer.param_groups:
        group["lr"] = rate


def check_shards(config: Config, placement: Placement, images: Images) -> None:
    """Raise UsageError if a batch is too small to give two samples to every rank of a network.

    An epoch's last batch may leave a rank's shard empty, except with batch_norm=sync, where the
    other ranks would wait for it.
    """
    batch_size, last = images.size_of(0), images.size_of(images.steps_per_epoch - 1)
    suffix = "" if batch_size == config.data.batch_size else ", all that there are,"
    if problem := placement.problem_with(batch_size, suffix):
        raise UsageError(problem)
    for name in placement.networks:
        last_shards = placement.shards(name, last).values()
        if config.compute.batch_norm == "sync" and not all(s.stop > s.start for s in last_shards):
            raise UsageError(
                f"compute.batch_norm: sync, but an epoch's last batch of {last} images leaves a "
                f"rank of {placement.whose(name)} none; use data.drop_last=true"
            )
