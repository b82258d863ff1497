"""The training loop of one rank, around the step in `step.py`.

Not covered: checkpoints and resuming.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from switokd.config.config import Config
from switokd.coordination.client import Client
from switokd.coordination.local import LocalDecider
from switokd.data.images import Images
from switokd.data.loader import Batch, Batches
from switokd.errors import (
    NonFiniteError,
)
from switokd.runs.recorder import RunRecorder
from switokd.runtime.placement import LocalPlacement
from switokd.runtime.process_group import World
from switokd.training.batch_norm import average_statistics
from switokd.training.build import (
    set_learning_rate,
)
from switokd.training.evaluate import top1
from switokd.training.exchange import Exchange, adding_up
from switokd.training.held_out import HeldOut
from switokd.training.learner import Learner
from switokd.training.meters import EpochLog, WaitingTimes
from switokd.training.step import train_step


@dataclass(frozen=True)
class Trainer:
    """One rank with everything set up."""

    config: Config
    world: World
    images: Images
    batches: Iterator[Batch]
    learners: list[Learner]
    exchange: Exchange
    decider: Client | LocalDecider
    recorder: RunRecorder | None
    """On rank 0 only."""

    @property
    def place(self) -> LocalPlacement:
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
        waiting = self.world.gather(WaitingTimes.of(self.exchange, self.decider))
        if self.recorder:
            self.recorder.waiting = waiting
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
            if self.recorder:
                self.recorder.step(step, epoch, result, self.exchange.passed_at)
        with self.exchange.watched(adding_up(steps[-1])):
            log.end_of_training()
        is_last = steps[-1] == total_steps(self.config, self.images)
        is_tested = is_last or (epoch + 1) % self.config.schedule.evaluate_every == 0
        if is_tested:
            self._check_weights()
            self._evaluate(log, tests)
        rows = [row for rank in self.world.gather(log.rows()) for row in rank]
        if self.recorder:
            for name, accuracy in self.recorder.epoch(epoch, steps[-1], rows).items():
                self.decider.progress(name, 0, test_accuracy=accuracy)
        if is_tested:
            # Only rank 0 has all parts of the test set's result, and only who improved sends.
            improved = self.world.broadcast(self.recorder.improved if self.recorder else None)
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
        if self.recorder:
            self.recorder.folder.save_weights(
                {k: v for rank in states for k, v in rank.items()}, folder
            )


def _plain_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict as others expect to load it, whatever order it was computed in."""
    return {key: value.cpu().contiguous() for key, value in model.state_dict().items()}


def total_steps(config: Config, images: Images) -> int:
    """Steps of the whole run."""
    steps = config.schedule.epochs * images.steps_per_epoch
    return min(steps, config.schedule.max_steps or steps)
