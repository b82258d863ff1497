"""The training loop of one rank, around the step in `step.py`.

Not covered: checkpoints and resuming.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from switokd import models, run_folder
from switokd.alone import Alone
from switokd.auto import Choice, choose_placement
from switokd.client import Client, Endpoint, Seat
from switokd.config import Config
from switokd.coordinator_process import coordinator_process
from switokd.data import Batch, Batches, Images, open_images
from switokd.data.feed import feed
from switokd.desk import Desk
from switokd.environment import Environment
from switokd.errors import CollectiveError, NonFiniteError, PeerError, first_line
from switokd.evaluate import top1
from switokd.exchange import Exchange, adding_up
from switokd.held_out import HeldOut
from switokd.interface import Interface
from switokd.learner import Learner, average_statistics
from switokd.lifecycle import (
    Overdue,
    Terminated,
    end_if_stuck,
    ignore_sigterm,
    unwind_on_sigterm,
)
from switokd.memory import keep_freed_memory
from switokd.placement import Place, Placement
from switokd.schedules import Windows
from switokd.setup import (
    Models,
    check_shards,
    make_learners,
    make_models,
    make_routines,
    set_learning_rate,
    tf32,
)
from switokd.step import train_step
from switokd.telemetry import EpochLog, Waiting
from switokd.threads import stay_within_limits
from switokd.world import (
    World,
    check_same_configuration,
    choose_device,
    join_world,
)


@dataclass(frozen=True)
class Trainer:
    """One rank with everything set up."""

    config: Config
    world: World
    images: Images
    batches: Iterator[Batch]
    learners: list[Learner]
    exchange: Exchange
    decider: Client | Alone
    desk: Desk | None
    """On rank 0 only."""

    @property
    def place(self) -> Place:
        """Which networks and which parts of the batches are this rank's."""
        return self.exchange.place

    def run(self) -> None:
        """Train to the end and save the weights."""
        steps, done = total_steps(self.config, self.images), 0
        tests = {learner.name: self._test(learner) for learner in self.learners}
        held_out = HeldOut.of(self.images, self.config.method.strategy, self.exchange)
        for epoch in range(self.config.schedule.epochs):
            if done < steps:
                last = min(done + self.images.steps_per_epoch, steps)
                held_out.observe(self.learners, done + 1)
                self._epoch(epoch, range(done + 1, last + 1), tests)
                done = last
        self.decider.decision(steps)  # students have not waited for it; the record does
        self.save_weights("weights", averages=True)
        waiting = self.world.gather(Waiting.of(self.exchange, self.decider))
        if self.desk:
            self.desk.waiting = waiting
        self.decider.close()

    def _epoch(self, epoch: int, steps: range, tests: dict[str, Batches]) -> None:
        """Train one epoch, and evaluate it if it is time to."""
        log = EpochLog(self.learners, self.place, self.decider, self.world.device)
        method = self.config.method
        for step in steps:
            for learner in self.learners:
                set_learning_rate(self.config, learner, step, self.images.steps_per_epoch)
            x, y = next(self.batches)
            n = self.images.size_of(step - 1)
            result = train_step(self.learners, step, x, y, n, method, self.exchange, self.decider)
            with self.exchange.watched(adding_up(step)):
                log.add(result, n)
            if self.desk:
                self.desk.step(step, epoch, result, self.exchange.passed_at)
        with self.exchange.watched(adding_up(steps[-1])):
            log.end_of_training()
        is_last = steps[-1] == total_steps(self.config, self.images)
        is_tested = is_last or (epoch + 1) % self.config.schedule.evaluate_every == 0
        if is_tested:
            self._check_weights()
            self._evaluate(log, tests)
        rows = [row for rank in self.world.gather(log.rows()) for row in rank]
        if self.desk:
            for name, accuracy in self.desk.epoch(epoch, steps[-1], rows).items():
                self.decider.progress(name, 0, test_accuracy=accuracy)
        if is_tested:
            # Only rank 0 has all parts of the test set's result, and only who improved sends.
            improved = self.world.broadcast(self.desk.improved if self.desk else None)
            if improved:
                self.save_weights("weights/best", improved)

    def _evaluate(self, log: EpochLog, tests: dict[str, Batches]) -> None:
        """Test this rank's networks, and their moving averages, on its part of the test set."""
        for learner in self.learners:  # all of them before any evaluation, which may take long
            for model in filter(None, (learner.model, learner.averaged)):
                average_statistics(learner, model, self._share(learner), self.world.transport)
        for learner in self.learners:
            name, device = learner.name, self.world.device
            log.tested(name, *top1(learner, tests[name], device))
            if learner.averaged is not None:
                log.tested_average(name, *top1(learner, tests[name], device, learner.averaged))

    def _share(self, learner: Learner) -> float:
        """How much of a full batch this rank computes for one of its networks, 0 to 1."""
        n = self.images.size_of(0)
        shard = self.place.shard(learner.name, n)
        return float((shard.stop - shard.start) / n)

    def _test(self, learner: Learner) -> Batches:
        """This rank's part of the test set, for one of its networks."""
        ranks = self.place.placement.ranks_of(learner.name)
        return self.images.test(index=ranks.index(self.world.rank), of=len(ranks))

    def _check_weights(self) -> None:
        """NonFiniteError if the last update, which no later step has shown, spoilt a network."""
        for learner in self.learners:
            if not all(value.isfinite().all() for value in learner.model.parameters()):
                error = NonFiniteError(
                    f"network {learner.name} (rank {self.world.rank}) has weights that are not "
                    "finite after its last step; they were not saved"
                )
                error.seen_by_every_rank = False
                raise error

    def save_weights(
        self, folder: str, names: Collection[str] | None = None, averages: bool = False
    ) -> None:
        """Hand networks' state dicts to rank 0, which writes them to `folder`/NAME.pt.

        names: those networks only. averages: the moving averages as well, to `folder`/NAME.ema.pt.
        """
        mine: dict[str, dict[str, Any]] = {}
        for learner in self.learners:
            is_first = self.world.rank == self.place.placement.ranks_of(learner.name)[0]
            if is_first and (names is None or learner.name in names):
                mine[learner.name] = _plain_state(learner.model)
                if averages and learner.averaged is not None:
                    mine[f"{learner.name}.ema"] = _plain_state(learner.averaged)
        states = self.world.gather(mine)
        if self.desk:
            self.desk.folder.save_weights(
                {k: v for rank in states for k, v in rank.items()}, folder
            )


def _plain_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict as others expect to load it, whatever order it was computed in."""
    return {key: value.cpu().contiguous() for key, value in model.state_dict().items()}


def train(config: Config, env: Environment) -> Path | None:
    """Train this rank's networks among the others, from nothing to a finished run folder.

    Rank 0 gives the folder back; a rank that placement: auto does not need does nothing.
    UsageError, NonFiniteError, PeerError as in `errors.py`.
    """
    if env.rank == 0:
        run_folder.check(config)
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
        place = Place(placement, env.rank)
        windows = Windows(config.schedule.accumulate, images.steps_per_epoch, steps)
        learners = make_learners(config, place, built, world, images, windows)
        images = images.on(device, config.compute.data_on_device)
        stream = images.stream(steps, part=place.part)
        batches = feed(stream, device, config.compute.channels_last, config.compute.copy_ahead)
        desk = world.on_rank_0(lambda: Desk(config, placement, steps))
        if desk:
            stack.callback(desk.folder.discard_if_unused)
        decider, where = stack.enter_context(decided_by(config, world, placement, desk))
        soft, routines = config.data.has_soft_targets, make_routines(config.compute, device)
        exchange = Exchange(
            place, config.digest, images.classes, world.steps, world.transport, soft, routines
        )
        if world.is_silent and isinstance(decider, Client):
            exchange.overdue = Overdue(config.coordinator.timeout, decider.stall)
        trainer = Trainer(config, world, images, batches, learners, exchange, decider, desk)
        counts = {li.name: models.parameter_count(li.model) for li in learners}
        gathered = world.gather(counts)
        if desk:
            desk.parameters = {name: n for rank in gathered for name, n in rank.items()}
            desk.folder.save_interface(Interface.of(images))
            desk.folder.save_profiles(choice.measured)
        if config.save_initial_weights:
            trainer.save_weights("weights/initial")
        with desk.bar if desk else nullcontext():
            if desk:
                desk.bar.console.print(describe(config, world, placement, where))
            trainer.run()
        if desk:
            desk.finish()
        return desk.folder.path if desk else None


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


def total_steps(config: Config, images: Images) -> int:
    """Steps of the whole run."""
    steps = config.schedule.epochs * images.steps_per_epoch
    return min(steps, config.schedule.max_steps or steps)


@contextmanager
def decided_by(
    config: Config, world: World, placement: Placement, desk: Desk | None
) -> Iterator[tuple[Client | Alone, str]]:
    """Who decides, and where that is in words."""
    if config.coordinator.address == "off":
        assert desk is not None, "one process, which is rank 0"
        if not world.env.embedded:
            unwind_on_sigterm()
        yield Alone(config, desk.on_decision), "no coordinator"
        return
    with meeting_point(config, world) as (endpoint, run_id):
        where = f"coordinator {endpoint}"
        if endpoint.http:
            where = f"live metrics http://{endpoint.http}/metrics"
        with joined(Seat(endpoint, run_id, world.rank), config, placement, desk) as client:
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
def joined(seat: Seat, config: Config, placement: Placement, desk: Desk | None) -> Iterator[Client]:
    """A client that says goodbye with the reason if the body fails.

    Where a peer's loss shows here first as a broken collective, or as torchrun's SIGTERM, the
    coordinator may know more: then its PeerError is raised instead.
    """
    client = Client(
        seat,
        config,
        placement,
        on_decision=desk.on_decision if desk else lambda decision: None,
        on_failure=end_if_stuck(placement.who(seat.rank)),
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
