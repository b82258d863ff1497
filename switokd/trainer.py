"""The training loop of one rank, around the step in `step.py`.

Not covered: checkpoints and resuming.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from zlib import crc32

import torch

from switokd import models, run_folder
from switokd.client import Client, Endpoint, Seat
from switokd.config import Config, Network
from switokd.coordinator_process import coordinator_process
from switokd.data import Batch, Images, open_images
from switokd.data.augment import mix
from switokd.desk import Desk, Tally
from switokd.environment import Environment
from switokd.errors import CollectiveError, NonFiniteError, PeerError, UsageError
from switokd.evaluate import top1
from switokd.exchange import Exchange
from switokd.lifecycle import Terminated, end_if_stuck, unwind_on_sigterm
from switokd.placement import Placement
from switokd.step import Learner, train_step
from switokd.strategy import STRATEGIES
from switokd.telemetry import Meter, MetricsFeed
from switokd.topology import Role
from switokd.world import (
    World,
    check_same_configuration,
    choose_device,
    gpu_count,
    join_world,
)


@dataclass(frozen=True)
class Trainer:
    """One rank with everything set up."""

    config: Config
    world: World
    images: Images
    batches: Iterator[Batch]
    learner: Learner
    exchange: Exchange
    client: Client
    desk: Desk | None
    """On rank 0 only."""

    def run(self) -> tuple[list[Tally], float]:
        """Train to the end and save the weights.

        Returns, on rank 0, every network's tally, and the seconds that training itself took.
        """
        learner, test = self.learner, self.images.test()
        role = self.config.topology.role(learner.name)
        tally = Tally(learner.name, role.value, models.parameter_count(learner.model))
        steps, seconds = total_steps(self.config, self.images), 0.0
        for epoch in range(self.config.schedule.epochs):
            if tally.steps < steps:
                set_learning_rate(self.config, learner, epoch)
                seconds += self._epoch(epoch, steps, tally, test)
        self.client.decision(steps)  # students have not waited for it; the record does
        self._check_weights()
        self.save_weights("weights")
        tallies = self.world.gather(tally)
        self.client.close()
        return tallies, seconds

    def _epoch(self, epoch: int, steps: int, tally: Tally, test: Iterable[Batch]) -> float:
        """Train and evaluate one epoch; return the seconds that training took."""
        device, learner = self.world.device, self.learner
        meter = Meter(learner.name, device)
        feed = MetricsFeed(self.client, learner.name, device)
        started = time.monotonic()
        for step in range(
            tally.steps + 1, min(tally.steps + self.images.steps_per_epoch, steps) + 1
        ):
            x, y = (t.to(device) for t in next(self.batches))
            result = train_step(learner, step, x, y, self.exchange, self.client)
            tally.steps, tally.samples = step, tally.samples + len(y)
            tally.steps_paused += result.loss is None
            meter.add(result, y)
            feed.add(result, y)
            if self.desk:
                self.desk.bar.step(step, epoch, result, y)
        seconds = time.monotonic() - started
        accuracy = top1(learner.model, test, device)
        tally.top1_last = 100 * accuracy
        tally.top1_best = max(tally.top1_best, tally.top1_last)
        feed.send(test_accuracy=accuracy)
        loss, train_accuracy = meter.read()
        line = {
            "epoch": epoch + 1,
            "step": tally.steps,
            "network": tally.network,
            "role": tally.role,
            "loss": loss,
            "train_top1": None if train_accuracy is None else 100 * train_accuracy,
            "test_top1": tally.top1_last,
            "lr": learner.optimizer.param_groups[0]["lr"],
            "steps_paused": tally.steps_paused,
            "samples_per_second": meter.samples / seconds,
        }
        lines = self.world.gather(line)
        if self.desk:
            self.desk.epoch(epoch, lines)
        return seconds

    def _check_weights(self) -> None:
        """NonFiniteError if the last update, which no later step has shown, spoilt the network."""
        if not all(value.isfinite().all() for value in self.learner.model.parameters()):
            error = NonFiniteError(
                f"network {self.learner.name} (rank {self.world.rank}) has weights that are not "
                "finite after its last step; no weights were saved"
            )
            error.seen_by_every_rank = False
            raise error

    def save_weights(self, folder: str) -> None:
        """Hand every network's state dict to rank 0, which writes them to `folder`/NAME.pt."""
        state = {key: value.cpu() for key, value in self.learner.model.state_dict().items()}
        states = self.world.gather((self.learner.name, state))
        if self.desk:
            self.desk.folder.save_weights(dict(states), folder)


def train(config: Config, placement: Placement, env: Environment) -> None:
    """Train this rank's network among the others, from nothing to a finished run folder.

    UsageError, NonFiniteError, PeerError as in `errors.py`.
    """
    name = placement.network_of[env.rank]
    if env.rank == 0:
        run_folder.check(config)
    images = open_images(config.data, config.seed)
    steps = total_steps(config, images)
    device = choose_device(config.device, env)
    learner = make_learner(config, name, images, device)
    batches = images.stream(steps)
    with ExitStack() as stack:
        world = stack.enter_context(join_world(env, device, config.coordinator.timeout))
        found = {
            "training images": images.samples,
            "classes": images.classes,
            "kind of device": device.type,
        }
        check_same_configuration(world, {**config.must_agree(), **found})
        desk = world.on_rank_0(lambda: Desk(config, steps))
        if desk:
            stack.callback(desk.folder.discard_if_unused)
        endpoint, run_id = stack.enter_context(meeting_point(config, world))
        client = stack.enter_context(
            joined(Seat(endpoint, run_id, env.rank), config, placement, desk)
        )
        exchange = Exchange(placement, config.digest, images.classes)
        trainer = Trainer(config, world, images, batches, learner, exchange, client, desk)
        if config.save_initial_weights:
            trainer.save_weights("weights/initial")
        with desk.bar if desk else nullcontext():
            if desk:
                desk.bar.console.print(describe(world, endpoint))
            tallies, seconds = trainer.run()
        if desk:
            desk.finish(tallies, seconds)


def describe(world: World, endpoint: Endpoint) -> str:
    """Where a run takes place, in a line."""
    device, processes, gpus = world.device.type, world.env.world_size, gpu_count()
    where = f"{processes} processes on {device}"
    if device == "cpu" and gpus:
        where += f" ({gpus} GPU{'s' if gpus > 1 else ''}, not one for each process)"
    if endpoint.http:
        return f"{where}, live metrics http://{endpoint.http}/metrics"
    return f"{where}, coordinator {endpoint}"


def total_steps(config: Config, images: Images) -> int:
    """Steps of the whole run."""
    steps = config.schedule.epochs * images.steps_per_epoch
    return min(steps, config.schedule.max_steps or steps)


def make_learner(config: Config, name: str, images: Images, device: torch.device) -> Learner:
    """Build one network with its optimizer; its first weights depend on (seed, name) alone."""
    network, distillation = config.networks[name], config.distillation
    torch.manual_seed(int(mix(config.seed, crc32(name.encode()))) % 2**63)
    try:
        model = models.build(network.model, images.shape[0], images.classes, network.model_kwargs)
        models.check_output(model, network.model, images.shape, images.classes)
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(f"model {network.model} has no parameter to train")
    except UsageError as error:
        error.seen_by_every_rank = False  # the other ranks build other networks
        raise
    model = model.to(device).train()
    is_student = config.topology.role(name) is Role.STUDENT
    return Learner(
        name=name,
        model=model,
        optimizer=make_optimizer(network, model),
        topology=config.topology,
        strategy=STRATEGIES[distillation.strategy],
        tau=distillation.temperature,
        kl_weight=distillation.alpha if is_student else distillation.beta,
    )


def make_optimizer(network: Network, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The run file's optimizer over all of the model's parameters."""
    settings = network.optimizer.model_dump(exclude={"name"})
    if network.optimizer.name == "adam":
        return torch.optim.Adam(model.parameters(), **settings)
    return torch.optim.SGD(model.parameters(), **settings)


def set_learning_rate(config: Config, learner: Learner, epoch: int) -> None:
    """Multi-step schedule by epochs begun; a paused teacher's goes on like the others'."""
    passed = sum(epoch >= milestone for milestone in config.schedule.milestones)
    for group in learner.optimizer.param_groups:
        base = config.networks[learner.name].optimizer.lr
        group["lr"] = base * config.schedule.gamma**passed


@contextmanager
def meeting_point(config: Config, world: World) -> Iterator[tuple[Endpoint, str]]:
    """Agree on a coordinator and a run id; rank 0 starts a coordinator if none is given."""
    with ExitStack() as stack:

        def start() -> tuple[Endpoint, str]:
            endpoint = Endpoint(config.coordinator.address)
            if config.coordinator.address == "auto":
                port = config.coordinator.http_port
                endpoint = stack.enter_context(coordinator_process(world.env, port))
            return endpoint, f"{config.name}-{uuid.uuid4().hex[:6]}"

        yield world.broadcast(world.on_rank_0(start))


@contextmanager
def joined(seat: Seat, config: Config, placement: Placement, desk: Desk | None) -> Iterator[Client]:
    """A client that says goodbye with the reason if the body fails.

    Where a peer's loss shows here first as a broken collective, or as torchrun's SIGTERM, the
    coordinator may know more: then its PeerError is raised instead.
    """
    who = f"rank {seat.rank} ({placement.network_of[seat.rank]})"
    client = Client(
        seat,
        config,
        placement,
        on_decision=desk.on_decision if desk else lambda decision: None,
        on_failure=end_if_stuck(who),
    )
    unwind_on_sigterm()
    try:
        yield client
    except (PeerError, Terminated) as error:
        reason = client.why(error.doing if isinstance(error, CollectiveError) else "")
        client.close(failure=str(error) or "stopped by SIGTERM")
        raise reason or error from error
    except BaseException as error:
        client.close(failure=(str(error).splitlines() or [type(error).__name__])[0])
        raise
