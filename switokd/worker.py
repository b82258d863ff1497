"""One rank, from configuration to finished run folder: the only place that wires the parts."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from switokd.config.config import Config
from switokd.coordination.client import Client
from switokd.coordination.local import LocalDecider
from switokd.coordination.membership import Endpoint, Membership
from switokd.coordination.process import coordinator_process
from switokd.data.images import Images, open_images
from switokd.data.prefetch import prefetch
from switokd.data.signature import InputSignature
from switokd.errors import (
    CollectiveError,
    PeerError,
    first_line,
)
from switokd.models import registry
from switokd.planning.auto import Choice, choose_placement
from switokd.runs import run_folder
from switokd.runs.recorder import RunRecorder
from switokd.runtime.allocator import keep_freed_memory
from switokd.runtime.device import choose_device
from switokd.runtime.environment import Environment
from switokd.runtime.lifecycle import (
    Terminated,
    end_if_stuck,
    ignore_sigterm,
    unwind_on_sigterm,
)
from switokd.runtime.placement import LocalPlacement, Placement
from switokd.runtime.process_group import World, check_same_configuration, join_world
from switokd.runtime.threads import stay_within_limits
from switokd.runtime.watchdog import Watchdog
from switokd.training.build import (
    Models,
    check_shards,
    make_graphed_functions,
    make_learners,
    make_models,
    tf32,
)
from switokd.training.exchange import Exchange
from switokd.training.schedules import AccumulationWindow
from switokd.training.trainer import Trainer, total_steps


def train(config: Config, env: Environment) -> Path | None:
    """Train this rank's networks among the others, from nothing to a finished run folder.

    Rank 0 gives the folder back; a rank that placement: auto does not need does nothing.
    UsageError, NonFiniteError, PeerError as in `errors.py`.
    """
    if env.rank == 0:
        run_folder.check_run_dir(config)
    images = open_images(config.data, config.seed, config.method.strategy.held_out)
    steps = total_steps(config, images)
    device = choose_device(config.device, env)
    if not env.embedded:
        stay_within_limits()
    if config.compute.keep_memory and device.type == "cpu" and not env.embedded:
        keep_freed_memory()
    built: Models = {}
    if config.placement != "auto":
        # Before the ranks meet, so that a mistake in a model is not also a lost peer elsewhere.
        names = config.placement_on(env.world_size).networks_of(env.rank)
        built = make_models(config, names, images)
    with tf32(config.compute), ExitStack() as stack:
        world, choice = meet(stack, config, env, device, images)
        placement = choice.placement
        if env.rank >= placement.world_size:
            return None
        built = built or make_models(config, placement.networks_of(env.rank), images)
        check_shards(config, placement, images)
        place = LocalPlacement(placement, env.rank)
        windows = AccumulationWindow(config.schedule.accumulate, images.steps_per_epoch, steps)
        learners = make_learners(config, place, built, world, images, windows)
        images = images.on(device, config.compute.data_on_device)
        stream = images.stream(steps, part=place.part)
        batches = prefetch(stream, device, config.compute.channels_last, config.compute.copy_ahead)
        recorder = world.on_rank_0(lambda: RunRecorder(config, placement, steps))
        if recorder:
            stack.callback(recorder.folder.discard_if_unused)
        decider, where = stack.enter_context(decided_by(config, world, placement, recorder))
        soft, graphed_functions = (
            config.data.has_soft_targets,
            make_graphed_functions(config.compute, device),
        )
        exchange = Exchange(
            place,
            config.digest,
            images.classes,
            world.steps,
            world.transport,
            soft,
            graphed_functions,
        )
        if world.is_silent and isinstance(decider, Client):
            exchange.watchdog = Watchdog(config.coordinator.timeout, decider.stall)
        trainer = Trainer(config, world, images, batches, learners, exchange, decider, recorder)
        counts = {li.name: registry.parameter_count(li.model) for li in learners}
        gathered = world.gather(counts)
        if recorder:
            recorder.parameters = {name: n for rank in gathered for name, n in rank.items()}
            recorder.folder.save_signature(InputSignature.of(images))
            recorder.folder.save_profiles(choice.measured)
        if config.save_initial_weights:
            trainer.save_weights("weights/initial")
        with recorder.bar if recorder else nullcontext():
            if recorder:
                recorder.bar.console.print(describe(config, world, placement, where))
            trainer.run()
        if recorder:
            recorder.finish()
        return recorder.folder.path if recorder else None


def meet(
    stack: ExitStack, config: Config, env: Environment, device: torch.device, images: Images
) -> tuple[World, Choice]:
    """Join the other ranks, and come to know which networks are whose.

    A placement may need only the first ranks; the others' world is left then. `stack`, which has
    to be empty, leaves the world at its end.
    """
    world = stack.enter_context(join_world(env, device, config.coordinator.timeout))
    found = {
        "training images": images.samples,
        "classes": images.classes,
        "kind of device": device.type,
    }
    check_same_configuration(world, {**config.must_agree(), **found})
    if config.placement != "auto":
        return world, Choice(config.placement_on(env.world_size))
    choice = choose_placement(config, world, images)
    few = env.first(choice.placement.world_size)
    if few.world_size < env.world_size:
        stack.close()  # all leave together
        if env.rank < few.world_size:
            world = stack.enter_context(join_world(few, device, config.coordinator.timeout))
    return world, choice


def describe(config: Config, world: World, placement: Placement, where: str) -> str:
    """Where a run takes place, in a line or two."""
    device, processes = world.device.type, world.env.world_size
    words = f"{processes} process{'es' if processes > 1 else ''} on {device}, {where}"
    if config.placement != "dedicated" or processes != len(config.networks):
        words += f"\nplacement {placement}"
    if world.transport is not None:
        words += "\nranks share a GPU: exchanging over Gloo and the host's memory, not NCCL"
    if any(len(placement.ranks_of(name)) > 1 for name in placement.networks):
        kind = "all of a network's ranks" if config.compute.batch_norm == "sync" else "each rank"
        words += f"\nBatchNorm statistics: over {kind}"
    return words


@contextmanager
def decided_by(
    config: Config, world: World, placement: Placement, recorder: RunRecorder | None
) -> Iterator[tuple[Client | LocalDecider, str]]:
    """Who decides, and where that is in words."""
    if config.coordinator.address == "off":
        assert recorder is not None, "one process, which is rank 0"
        if not world.env.embedded:
            unwind_on_sigterm()
        yield LocalDecider(config, recorder.on_decision), "no coordinator"
        return
    with meeting_point(config, world) as (endpoint, run_id):
        where = f"coordinator {endpoint}"
        if endpoint.http:
            where = f"live metrics http://{endpoint.http}/metrics"
        with joined(
            Membership(endpoint, run_id, world.rank), config, placement, recorder
        ) as client:
            yield client, where


@contextmanager
def meeting_point(config: Config, world: World) -> Iterator[tuple[Endpoint, str]]:
    """Agree on a coordinator and a run id; rank 0 starts a coordinator if none is given."""
    with ExitStack() as stack:

        def start() -> tuple[Endpoint, str]:
            endpoint = Endpoint(config.coordinator.address)
            if config.coordinator.address == "auto":
                port = config.coordinator.http_port
                own = config.distillation.strategy if ":" in config.distillation.strategy else ""
                endpoint = stack.enter_context(coordinator_process(world.env, port, own))
            return endpoint, f"{config.name}-{uuid.uuid4().hex[:6]}"

        yield world.broadcast(world.on_rank_0(start))


@contextmanager
def joined(
    membership: Membership, config: Config, placement: Placement, recorder: RunRecorder | None
) -> Iterator[Client]:
    """A client that says goodbye with the reason if the body fails.

    Where a peer's loss shows here first as a broken collective, or as torchrun's SIGTERM, the
    coordinator may know more: then its PeerError is raised instead.
    """
    client = Client(
        membership,
        config,
        placement,
        on_decision=recorder.on_decision if recorder else lambda decision: None,
        on_failure=end_if_stuck(placement.who(membership.rank)),
    )
    unwind_on_sigterm()
    try:
        yield client
    except (PeerError, Terminated) as error:
        ignore_sigterm()  # torchrun's may come before the coordinator's account
        reason = client.why(error.doing if isinstance(error, CollectiveError) else "")
        client.close(failure=str(error) or "stopped by SIGTERM")
        raise reason or error from error
    except BaseException as error:
        client.close(failure=first_line(error))
        raise
