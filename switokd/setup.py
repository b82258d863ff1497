"""Building what a rank trains: its networks, their optimizers, their gradients' groups.

Not covered: the loop (`trainer.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from switokd import models
from switokd.config import Config
from switokd.data import Images
from switokd.data.augment import mix_one, seeding
from switokd.data.feed import in_order
from switokd.errors import UsageError, first_line
from switokd.gradients import Gradients
from switokd.learner import Learner
from switokd.placement import Place, Placement
from switokd.recording import Recorder, Recording, Routines, can_record, refusal
from switokd.schedules import Windows, learning_rate
from switokd.sections import Compute, Network
from switokd.stopwatch import Stopwatch
from switokd.topology import Role
from switokd.updates import AUTOCAST, Updates, loss_scaler, moving_average, parameter_groups
from switokd.world import World

MOST_FORMS = 64
"""That torch.compile may make of one class."""

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
            model = models.build(
                network.model, channels, images.classes, network.model_kwargs, min(sides)
            )
            models.check_output(model, network.model, images.shape, images.classes)
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(f"model {network.model} has no parameter to train")
        if network.weights is not None:
            models.load_weights(model, Path(network.weights), f"networks.{name}.weights")
    except UsageError as error:
        error.seen_by_every_rank = False  # the other ranks build other networks
        raise
    return model


def key_of(config: Config, name: str) -> int:
    """What a network draws from, of the run's seed and its name."""
    return mix_one(config.seed, crc32(name.encode()))


def make_learners(
    config: Config,
    place: Place,
    built: Models,
    world: World,
    images: Images,
    windows: Windows | None = None,
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
        make_learner(config, name, built[name], world, groups[name], windows or Windows())
        for name in place.networks
    ]
    batches = {images.size_of(0), images.size_of(images.steps_per_epoch - 1)}
    for learner in learners:
        shards = [place.shard(learner.name, n) for n in batches]
        for samples in sorted({shard.stop - shard.start for shard in shards} - {0}):
            make_ready(learner, samples, images.shape, config.compute)
    world.all_gather(None)  # networks take unequally long, and steps do not wait for long
    return learners


def make_learner(
    config: Config,
    name: str,
    model: torch.nn.Module,
    world: World,
    group: ProcessGroup | None,
    windows: Windows,
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
        gradients=Gradients(name, parameters, group, world.transport),
        frozen=frozen,
        key=key_of(config, name),
        low=AUTOCAST.get(precision),
        is_recorded=can_record(world.device) and config.wants_recording(name),
        routines=make_routines(config.compute, world.device),
        updates=Updates(
            windows,
            config.networks[name].clip_norm,
            loss_scaler(world.device) if precision == "fp16" and not frozen else None,
            average,
        ),
        learning=Stopwatch(world.device),
    )


def wake_backward(device: torch.device) -> None:
    """Let PyTorch's thread for backward find the GPU: cuBLAS warns where it is the first to."""
    torch.zeros((), device=device, requires_grad=True).mul(2).backward()  # type: ignore[no-untyped-call]


def make_routines(compute: Compute, device: torch.device) -> Routines:
    """What records functions of tensors, where the run file and the device allow it."""
    return Routines(device if compute.cuda_graphs is not False and can_record(device) else None)


def compiled(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as torch.compile makes it, anew for each of the few sizes that a shard has.

    PyTorch counts the forms of a class, not of a network, and leaves what is beyond the limit as it
    is: several networks of one class, each for whole batches and an epoch's last, need more.
    """
    from torch._dynamo import config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_FORMS)
    forward: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)
    return forward


def make_ready(
    learner: Learner, samples: int, shape: tuple[int, int, int], compute: Compute
) -> None:
    """Do before the first step what it would take long for, with so many images.

    Statistics and random numbers stay as they are. UsageError if it cannot be done.
    """
    device = next(learner.model.parameters()).device
    if not (compute.compile or learner.is_recorded):
        return
    buffers = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        x = in_order(torch.randn(samples, *shape, device=device), compute.channels_last)
        if compute.compile:
            compile_ahead(learner, x)
        if learner.is_recorded:
            record_ahead(learner, x)
    for name, buffer in learner.model.named_buffers():
        buffer.copy_(buffers[name])


def compile_ahead(learner: Learner, x: Tensor) -> None:
    """Compile forward and backward; UsageError if it fails, usually for want of a compiler."""
    from torch._inductor import config as inductor

    # PyTorch before 2.14 takes kernels from its cache whatever the number of threads in them.
    inductor.cpp.threads = torch.get_num_threads()
    try:
        z = learner.compute(x)
        if not learner.frozen:
            torch.autograd.grad(z.sum(), learner.gradients.parameters, allow_unused=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        usage = UsageError(
            f"compute.compile: torch.compile cannot compile {learner.name}: {first_line(error)}; a "
            "CPU needs a C++ compiler (g++), a GPU a C compiler (gcc), or use compute.compile=false"
        )
        usage.seen_by_every_rank = False
        raise usage from error


def record_ahead(learner: Learner, x: Tensor) -> None:
    """Record forward and backward as CUDA graphs; UsageError if the network does not allow it."""
    parameters = [] if learner.frozen else learner.gradients.parameters
    compute = learner.eager().compute  # else each would keep the other
    earlier = next(iter(learner.recordings.values()), None)
    try:
        recorder = earlier.recorder if earlier else Recorder(x.device)
        learner.recordings[len(x)] = Recording(compute, parameters, x, recorder)
    except Exception as error:
        remedy = "its forward must do the same every time and read nothing from the GPU, or "
        raise refusal(learner.name, error, remedy) from error


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


def check_batch_norm(config: Config, placement: Placement, world: World) -> None:
    """UsageError if statistics over several ranks are asked for where PyTorch has none."""
    shared = [name for name in placement.networks if len(placement.ranks_of(name)) > 1]
    if config.compute.batch_norm == "sync" and shared and world.backend != "nccl":
        raise UsageError(
            f"compute.batch_norm: sync needs a GPU of its own for each rank of {shared[0]}; use "
            "batch_norm=rank, or one rank per network"
        )


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
