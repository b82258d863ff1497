"""The training loop of one rank, around the step in `step.py`.

Not covered: building its parts (`worker.py`); checkpoints and resuming.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from switokd.config.config import Config
from switokd.data.images import Images
from switokd.data.loader import Batch
from switokd.runtime.process_group import World
from switokd.training.build import set_learning_rate
from switokd.training.evaluate import Evaluator
from switokd.training.exchange import gradient_sum
from switokd.training.held_out import HeldOut
from switokd.training.meters import EpochLog, WaitingTimes
from switokd.training.metrics import EpochMetrics, Row
from switokd.training.observer import Observer
from switokd.training.step import StepContext, train_step
from switokd.training.weights import check_finite, gather_weights


@dataclass(frozen=True)
class Trainer:
    """Trains the networks of one rank; every rank of the run runs its own trainer."""

    config: Config
    world: World
    images: Images
    batches: Iterator[Batch]
    context: StepContext
    observers: Sequence[Observer] = ()
    """Empty on all ranks but rank 0."""
    _best: dict[str, float] = field(default_factory=dict, init=False)
    """By network: the best top-1 so far, in percent; on rank 0 only."""

    def run(self) -> list[WaitingTimes]:
        """Train to the end and save the weights; return all ranks' waiting times on rank 0."""
        learners, exchange, decider = (
            self.context.learners,
            self.context.exchange,
            self.context.decider,
        )
        evaluator = Evaluator(learners, exchange.local_placement, self.images, self.world)
        held_out = HeldOut.of(self.images, self.config.method.strategy, exchange)
        last = total_steps(self.config, self.images)
        for epoch, first in enumerate(range(1, last + 1, self.images.steps_per_epoch)):
            held_out.observe(learners, first)
            end = min(first + self.images.steps_per_epoch, last + 1)
            self._epoch(epoch, range(first, end), evaluator)
        decider.decision(last)  # students do not wait for decisions, but the log needs the last one
        self.save_weights("weights", averages=True)
        waiting_times = self.world.gather(WaitingTimes.of(exchange, decider))
        decider.close()
        return waiting_times

    def _epoch(self, epoch: int, steps: range, evaluator: Evaluator) -> None:
        """Train one epoch; evaluate the networks if the run file asks for it in this epoch."""
        log = self._train(epoch, steps)
        is_last = steps[-1] == total_steps(self.config, self.images)
        is_tested = is_last or (epoch + 1) % self.config.schedule.evaluate_every == 0
        if is_tested:
            check_finite(self.context.learners, self.world.rank)
            evaluator.test(log)
        rows = [row for rank_rows in self.world.gather(log.rows()) for row in rank_rows]
        improved = self._publish(epoch, steps[-1], rows) if self.world.rank == 0 else None
        if is_tested:
            # Only rank 0 has the complete test results.
            improved = self.world.broadcast(improved)
            if improved:
                self.save_weights("weights/best", improved)

    def _train(self, epoch: int, steps: range) -> EpochLog:
        """Run the steps of an epoch; return this rank's measurements."""
        context, exchange = self.context, self.context.exchange
        log = EpochLog(
            context.learners, exchange.local_placement, context.decider, self.world.device
        )
        for step in steps:
            for learner in context.learners:
                set_learning_rate(self.config, learner, step, self.images.steps_per_epoch)
            x, y = next(self.batches)
            n = self.images.size_of(step - 1)
            result = train_step(context, step, x, y, n)
            with exchange.watched(gradient_sum(step)):
                log.add(result, n)
            for observer in self.observers:
                observer.on_step(step, epoch, result)
        with exchange.watched(gradient_sum(steps[-1])):
            log.end_of_training()
        return log

    def _publish(self, epoch: int, step: int, rows: Sequence[Row]) -> list[str]:
        """Hand an epoch's metrics to the observers; return the networks with a new best top-1."""
        metrics = EpochMetrics.of(epoch, step, self.config.topology, rows)
        for observer in self.observers:
            observer.on_epoch(metrics)
        for name, top1 in metrics.test_top1.items():
            self.context.decider.progress(name, 0, test_accuracy=top1 / 100)
        improved = {
            name: top1
            for name, top1 in metrics.test_top1.items()
            if top1 > self._best.get(name, -1.0)
        }
        self._best.update(improved)
        return list(improved)

    def save_weights(
        self, folder: str, names: Collection[str] | None = None, averages: bool = False
    ) -> None:
        """Hand networks' weights to the observers, which save them in `folder`.

        names: the networks to save; None: all. averages: whether to save moving averages too.
        """
        placement = self.context.exchange.local_placement.placement
        states = gather_weights(self.context.learners, placement, self.world, names, averages)
        for observer in self.observers:
            observer.on_weights(folder, states)


def total_steps(config: Config, images: Images) -> int:
    """Return the number of steps of the whole run."""
    steps = config.schedule.epochs * images.steps_per_epoch
    return min(steps, config.schedule.max_steps or steps)
