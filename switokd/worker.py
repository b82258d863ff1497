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
from switokd.runs import checkpoints, resume
from switokd.runs.curves import draw_curves
from switokd.runs.dead_networks import DeadNetworks
from switokd.runs.observers import make_observers
from switokd.runs.progress import ProgressBar
from switokd.runs.recorder import RunRecorder
from switokd.runs.resume import Resumption
from switokd.runs.run_dir import check_run_dir
from switokd.runs.trackers.state import TrackerState
from switokd.runtime.allocator import keep_freed_memory
from switokd.runtime.device import choose_device
from switokd.runtime.environment import Environment
from switokd.runtime.kept_warnings import WARNINGS
from switokd.runtime.lifecycle import (
    Preempted,
    StopFlag,
    print_warning,
)
from switokd.runtime.placement import LocalPlacement, Placement
from switokd.runtime.process_group import World, check_same_configuration, join_world
from switokd.runtime.step_spans import StepSpans, listening
from switokd.runtime.threads import fix_threads, stay_within_limits
from switokd.runtime.waiting import waiting
from switokd.runtime.watchdog import Watchdog
from switokd.tracing.opening import open_sender
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
from switokd.training.observer import ObservedRun, Observer
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
    observers: Sequence[Observer] = ()
    """Objects of the user that watch the training, besides those that the run file names."""


def train(config: Config, env: Environment, helpers: Helpers = Helpers()) -> Path | None:
    """Train this rank's networks together with the other ranks, and write the run folder.

    Returns the run folder on rank 0, None elsewhere. A rank that `placement: auto` does not use
    returns at once.
    UsageError, NonFiniteError and PeerError as in `errors.py`.
    """
    WARNINGS.begin(env.rank)
    if env.rank == 0:
        check_run_dir(config)
    with waiting(f"the data set {config.data.dataset} to be opened"):
        images = open_images(config.data, config.seed, config.method.strategy.held_out)
    device = choose_device(config.device, env)
    _set_process_limits(config, env, device)
    models: Models = {}
    loaded: dict[str, str] = {}
    if config.placement != "auto":
        # Before the ranks meet, so that an error in a model is not also a lost peer on other ranks.
        names = config.placement_on(env.world_size).networks_of(env.rank)
        models = make_models(config, names, images, loaded.__setitem__)
    with tf32(config.compute), ExitStack() as stack:
        world, choice = meet(stack, config, env, device, images)
        if env.rank >= choice.placement.world_size:
            return None
        if not models:
            names = choice.placement.networks_of(env.rank)
            models = make_models(config, names, images, loaded.__setitem__)
        # By name, because every rank of a network has loaded the same.
        loaded = {name: line for rank in world.gather(loaded) for name, line in rank.items()}
        given = [f"weights of {name}: {line}" for name, line in loaded.items()]
        return _train(stack, config, world, choice, images, models, given, helpers)


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
    given: Sequence[str],
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
    watching = (
        world.on_rank_0(lambda: make_observers(config, helpers.observers, print_warning)) or ()
    )
    output = world.on_rank_0(
        lambda: _open_output(stack, config, world.env, choice, images, parameters, resumption)
    )
    observers: tuple[Observer, ...] = ()
    if output:
        observers = *output, DeadNetworks(config.topology, print_warning), *watching
    joining = Joining(config, world, placement, helpers.wait_for_coordinator, done + 1)
    folder = output[0].folder.path if output else None
    decider, where = stack.enter_context(join_decider(joining, partial(_tell, observers), folder))
    world.on_rank_0(lambda: _introduce(stack, watching, folder, config, done, steps))
    _trace_steps(stack, config, world, placement, decider)
    stops = StopFlag()
    if config.checkpoint.keep and not world.env.embedded:
        stops.install()
    functions = GraphedFunctions(graph_context)
    exchange = _make_exchange(config, world, local_placement, images, functions, decider)
    guard = Guard(learners, exchange, config.schedule.on_nonfinite == "skip")
    context = StepContext(learners, config.method, exchange, decider, functions, guard, config.seed)
    clock = CheckpointClock(config.checkpoint, world.rank, stops, decider.commands)
    trainer = Trainer(config, world, images, batches, context, clock, observers, resumed)
    if config.save_initial_weights and not resumed:
        trainer.save_weights("weights/initial")
    if output is None:
        trainer.run()
        return None
    lines = [*_origin(resumption, steps, given), *images.sources.notes]
    lines += [describe(config, world, placement, where)]
    return _run_recorded(trainer, *output, lines, helpers)


def _origin(resumption: Resumption | None, steps: int, given: Sequence[str]) -> list[str]:
    """Return sentences on what the networks start from: a checkpoint, or the `given` weights."""
    lines = resumption.describe(steps) if resumption else []
    return lines if resumption and resumption.state else [*lines, *given]


def _run_recorded(
    trainer: Trainer,
    recorder: RunRecorder,
    bar: ProgressBar,
    lines: Sequence[str],
    helpers: Helpers,
) -> Path:
    """Train on rank 0, and finish the run folder. lines: what the console says first."""
    helpers.on_folder(recorder.folder.path)
    with bar, how_to_continue(recorder.folder.path):
        for line in lines:
            bar.console.print(line, markup=False, soft_wrap=True)
        waiting_times = trainer.run()
    recorder.finish(waiting_times, bar.console, helpers.draw)
    return recorder.folder.path


def _introduce(
    stack: ExitStack,
    observers: Sequence[Observer],
    folder: Path | None,
    config: Config,
    done: int,
    steps: int,
) -> None:
    """Tell the user's observers of their run now, and of its end when `stack` closes.

    done: the step after which the run continues. steps: of the whole run.
    """
    if not observers:
        return
    assert folder is not None, "rank 0 has one"
    run = ObservedRun(TrackerState(folder).run_id(config.name), folder, config, done, steps)

    def end(observer: Observer, _: object, error: BaseException | None, *trace: object) -> None:
        observer.on_end(error)

    for observer in observers:
        stack.push(partial(end, observer))
        observer.on_run(run)


def _trace_steps(
    stack: ExitStack, config: Config, world: World, placement: Placement, decider: Decider
) -> None:
    """Send traces of this rank's steps until `stack` closes, if the run file asks for them.

    Only rank 0 says if they cannot be delivered. Errors as `open_sender`.
    """
    if not config.tracking.traces_every:
        return
    say = print_warning if world.rank == 0 else lambda sentence: None
    sink = stack.enter_context(open_sender("switokd-rank", "tracking.traces_every", say))
    networks = placement.networks_of(world.rank)
    every, start = config.tracking.traces_every, decider.start
    stack.enter_context(listening(StepSpans(sink, every, *start, world.rank, networks)))


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
    stack.callback(WARNINGS.write_with, None)
    stack.callback(recorder.settle)  # a run that fails keeps its last checkpoints
    WARNINGS.write_with(recorder.folder.add_warning)
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
    """Add the command that continues the run to the message of Preempted and KeyboardInterrupt."""
    command = shlex.join(["switokd", "train", "--resume", str(folder)])
    try:
        yield
    except Preempted as stopped:
        verb = "continue" if checkpoints.stored(folder) else "there is no checkpoint; start again"
        raise type(stopped)(f"{stopped}; {verb} with: {command}") from None
    except KeyboardInterrupt as interrupt:
        if (folder / "decisions.jsonl").stat().st_size:  # else the folder will be removed
            verb = "there is no checkpoint yet; start again"
            if stored := checkpoints.stored(folder):
                verb = f"continue from the checkpoint of step {stored[0].step}"
            interrupt.args = (f"interrupted; {verb} with: {command}",)
        raise


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
