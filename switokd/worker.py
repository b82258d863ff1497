"""One rank, from the configuration to the finished run folder: the only place that wires parts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from switokd.config.config import Config
from switokd.coordination.decider import Decider
from switokd.coordination.join import Joining, join_decider
from switokd.coordination.membership import Endpoint
from switokd.data.images import Images, open_images
from switokd.data.prefetch import prefetch
from switokd.data.signature import InputSignature
from switokd.distillation.decision import Decision
from switokd.errors import UsageError
from switokd.models import registry
from switokd.planning.auto import Choice, choose_placement
from switokd.runs import resume, run_folder
from switokd.runs.curves import draw_curves
from switokd.runs.dead_networks import DeadNetworks
from switokd.runs.progress import ProgressBar
from switokd.runs.recorder import RunRecorder
from switokd.runs.resume import Resumption
from switokd.runtime.allocator import keep_freed_memory
from switokd.runtime.device import choose_device
from switokd.runtime.environment import Environment
from switokd.runtime.lifecycle import (
    Preempted,
    StopFlag,
    print_error,
)
from switokd.runtime.placement import LocalPlacement, Placement
from switokd.runtime.process_group import World, check_same_configuration, join_world
from switokd.runtime.threads import fix_threads, stay_within_limits
from switokd.runtime.watchdog import Watchdog
from switokd.training.build import (
    Models,
    check_shards,
    make_graph_context,
    make_learners,
    make_models,
    tf32,
)
from switokd.training.checkpoint import CheckpointClock, SavedState, State, restore
from switokd.training.cuda_graphs import GraphedFunctions
from switokd.training.exchange import Exchange
from switokd.training.learner import Learner
from switokd.training.nonfinite import Guard
from switokd.training.observer import Observer
from switokd.training.schedules import AccumulationWindow
from switokd.training.step import StepContext
from switokd.training.trainer import Trainer, total_steps


@dataclass(frozen=True)
class Helpers:
    """What rank 0 leaves to other processes; the other ranks use none of it."""

    wait_for_coordinator: Callable[[], Endpoint] | None = None
    """Waits for the coordinator that this command has started. None if the run has no such
    coordinator."""
    draw: Callable[[Path], object] = draw_curves
    """Draws the curves of a run folder, or lets another process draw them."""
    on_folder: Callable[[Path], object] = lambda folder: None
    """Receives the run folder as soon as it exists."""


def train(config: Config, env: Environment, helpers: Helpers = Helpers()) -> Path | None:
    """Train this rank's networks together with the other ranks, and write the run folder.

    Returns the run folder on rank 0, None elsewhere. A rank that `placement: auto` does not use
    returns at once.
    UsageError, NonFiniteError and PeerError as in `errors.py`.
    """
    if env.rank == 0:
        run_folder.check_run_dir(config)
    images = open_images(config.data, config.seed, config.method.strategy.held_out)
    device = choose_device(config.device, env)
    _set_process_limits(config, env, device)
    models: Models = {}
    if config.placement != "auto":
        # Before the ranks meet, so that an error in a model is not also a lost peer on other ranks.
        names = config.placement_on(env.world_size).networks_of(env.rank)
        models = make_models(config, names, images)
    with tf32(config.compute), ExitStack() as stack:
        world, choice = meet(stack, config, env, device, images)
        if env.rank >= choice.placement.world_size:
            return None
        models = models or make_models(config, choice.placement.networks_of(env.rank), images)
        return _train(stack, config, world, choice, images, models, helpers)


def _set_process_limits(config: Config, env: Environment, device: torch.device) -> None:
    """Set the number of threads and the allocator, except in a user's own process (embedded)."""
    if env.embedded:
        return
    if config.compute.micro_batches > 1:
        fix_threads()
    stay_within_limits()
    if config.compute.keep_memory and device.type == "cpu":
        keep_freed_memory()


def meet(
    stack: ExitStack, config: Config, env: Environment, device: torch.device, images: Images
) -> tuple[World, Choice]:
    """Join the other ranks, and choose the placement if the run file leaves the choice open.

    If the placement uses only the first ranks, all ranks leave the world, and these ranks join a
    smaller one. stack: must be empty; leaves the world when it closes.
    """
    world = stack.enter_context(join_world(env, device, config.coordinator.timeout))
    facts = {
        "training images": images.samples,
        "classes": images.classes,
        "kind of device": device.type,
    }
    check_same_configuration(world, {**config.must_agree(), **facts})
    if config.placement != "auto":
        return world, Choice(config.placement_on(env.world_size))
    choice = choose_placement(config, world, images)
    first_ranks = env.first(choice.placement.world_size)
    if first_ranks.world_size < env.world_size:
        stack.close()  # all ranks leave together
        if env.rank < first_ranks.world_size:
            timeout = config.coordinator.timeout
            world = stack.enter_context(join_world(first_ranks, device, timeout))
    return world, choice


def _train(
    stack: ExitStack,
    config: Config,
    world: World,
    choice: Choice,
    images: Images,
    models: Models,
    helpers: Helpers,
) -> Path | None:
    """Build the parts of one rank, connect them, and train; return the run folder on rank 0."""
    placement, device = choice.placement, world.device
    check_shards(config, placement, images)
    local_placement = LocalPlacement(placement, world.rank)
    steps = total_steps(config, images)
    window = AccumulationWindow(config.schedule.accumulate, images.steps_per_epoch, steps)
    graph_context = make_graph_context(config.compute, device)
    learners = make_learners(config, local_placement, models, world, images, window, graph_context)

    resumption = world.on_rank_0(lambda: resume.find(config))
    resumed = resumed_part(world, placement, resumption, steps)
    done = resumed["step"] if resumed else 0
    if resumed:
        restore(learners, resumed)
    images = images.on(device, config.compute.data_on_device)
    stream = images.stream(steps, first=done, part=local_placement.part)
    batches = prefetch(stream, device, config.compute.channels_last, config.compute.copy_ahead)

    parameters = _parameter_counts(world, learners)
    output = world.on_rank_0(
        lambda: _open_output(stack, config, world.env, choice, images, parameters, resumption)
    )
    observers: tuple[Observer, ...] = ()
    if output:
        observers = *output, DeadNetworks(config.topology, print_error)
    joining = Joining(config, world, placement, helpers.wait_for_coordinator, done + 1)
    folder = output[0].folder.path if output else None
    decider, where = stack.enter_context(join_decider(joining, partial(_tell, observers), folder))
    stops = StopFlag()
    if config.checkpoint.keep and not world.env.embedded:
        stops.install()
    functions = GraphedFunctions(graph_context)
    exchange = _make_exchange(config, world, local_placement, images, functions, decider)
    guard = Guard(learners, exchange, config.schedule.on_nonfinite == "skip")
    context = StepContext(learners, config.method, exchange, decider, functions, guard)
    clock = CheckpointClock(config.checkpoint, world.rank, stops)
    trainer = Trainer(config, world, images, batches, context, clock, observers, resumed)
    if config.save_initial_weights and not resumed:
        trainer.save_weights("weights/initial")
    if output is None:
        trainer.run()
        return None
    recorder, bar = output
    helpers.on_folder(recorder.folder.path)
    with bar, how_to_continue(recorder.folder.path):
        for line in resumption.describe(steps) if resumption else ():
            bar.console.print(line, markup=False)
        bar.console.print(describe(config, world, placement, where))
        waiting_times = trainer.run()
    recorder.finish(waiting_times, bar.console, helpers.draw)
    return recorder.folder.path


def _tell(observers: Sequence[Observer], decision: Decision) -> None:
    for observer in observers:
        observer.on_decision(decision)


def _make_exchange(
    config: Config,
    world: World,
    local_placement: LocalPlacement,
    images: Images,
    functions: GraphedFunctions,
    decider: Decider,
) -> Exchange:
    """Return the exchange of the training steps; `decider` hears of one that takes too long."""
    return Exchange(
        local_placement,
        digest=config.digest,
        classes=images.classes,
        group=world.steps,
        transport=world.transport,
        soft_targets=config.data.has_soft_targets,
        functions=functions,
        watchdog=Watchdog(config.coordinator.timeout, decider.stall) if world.is_silent else None,
    )


def _parameter_counts(world: World, learners: Sequence[Learner]) -> dict[str, int]:
    """Return the number of parameters of every network of the run; empty except on rank 0."""
    counts = world.gather({li.name: registry.parameter_count(li.model) for li in learners})
    return {name: n for rank_counts in counts for name, n in rank_counts.items()}


def _open_output(
    stack: ExitStack,
    config: Config,
    env: Environment,
    choice: Choice,
    images: Images,
    parameters: dict[str, int],
    resumption: Resumption | None,
) -> tuple[RunRecorder, ProgressBar]:
    """Create the run folder, or open that of a run that continues; and the progress bar.

    stack: waits for queued checkpoints when it closes, and removes the folder if the run ended
    before its first decision.
    """
    recorder = RunRecorder(config, choice.placement, parameters, resumption, env.started)
    stack.callback(recorder.folder.discard_if_unused)
    stack.callback(recorder.settle)  # a run that fails keeps its last checkpoints
    recorder.folder.save_signature(InputSignature.of(images))
    recorder.folder.save_profiles(choice.measured)
    steps, epochs = total_steps(config, images), config.schedule.epochs
    paused = resume.paused_by_step(recorder.folder.path, resumption.step) if resumption else {}
    return recorder, ProgressBar(config.name, steps, epochs, config.topology, paused)


def resumed_part(
    world: World, placement: Placement, resumption: Resumption | None, steps: int
) -> State | None:
    """Return this rank's part of the checkpoint that rank 0 has read; None if there is none.

    steps: of the whole run. UsageError if the checkpoint is behind them.
    """

    def parts() -> list[State | None]:
        if resumption is None or not resumption.state:
            return [None] * world.env.world_size
        if resumption.step > steps:
            raise UsageError(
                f"run_dir: the run in {resumption.folder} has made {resumption.step} steps "
                f"already, and the schedule asks for {steps}; use more schedule.epochs"
            )
        saved = SavedState.of(resumption.state)
        return [saved.for_rank(rank, placement) for rank in range(world.env.world_size)]

    part: State | None = world.scatter(world.on_rank_0(parts))
    return part


@contextmanager
def how_to_continue(folder: Path) -> Iterator[None]:
    """Add the command that continues the run to the message of Preempted."""
    try:
        yield
    except Preempted as stopped:
        command = shlex.join(["switokd", "train", "--resume", str(folder)])
        raise Preempted(f"{stopped}; continue with: {command}") from None


def describe(config: Config, world: World, placement: Placement, where: str) -> str:
    """Return one to four lines about where a run computes, and how its ranks exchange.

    where: the decider, as `join_decider` describes it.
    """
    device, processes = world.device.type, world.env.world_size
    lines = f"{processes} process{'es' if processes > 1 else ''} on {device}, {where}"
    if config.placement != "dedicated" or processes != len(config.networks):
        lines += f"\nplacement {placement}"
    if world.transport is not None:
        lines += "\nranks share a GPU: exchanging over Gloo and the host's memory, not NCCL"
    if any(len(placement.ranks_of(name)) > 1 for name in placement.networks):
        scope = "all of a network's ranks" if config.compute.batch_norm == "sync" else "each rank"
        scope = "each micro-batch" if config.compute.micro_batches > 1 else scope
        lines += f"\nBatchNorm statistics: over {scope}"
    return lines
