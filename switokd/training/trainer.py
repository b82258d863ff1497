"""The training loop of one rank, around the step in `step.py`.

Not covered: building its parts (`worker.py`); the content of a checkpoint (`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

from switokd.config.config import Config
from switokd.coordination.progress import NetworkProgress
from switokd.data.images import Images
from switokd.data.loader import Batch
from switokd.errors import NonFiniteError
from switokd.runtime.kept_warnings import WARNINGS
from switokd.runtime.lifecycle import ignore_sigterm
from switokd.runtime.phase import ACTIVITY, Phase
from switokd.runtime.process_group import World
from switokd.training.agreement import Agreement
from switokd.training.build import set_learning_rate
from switokd.training.checkpoint import (
    CheckpointClock,
    SavedState,
    State,
    capture,
    copied,
)
from switokd.training.evaluate import Evaluator
from switokd.training.exchange import Request, gradient_sum
from switokd.training.held_out import HeldOut
from switokd.training.meters import EpochLog, WaitingTimes
from switokd.training.metrics import EpochMetrics, Row
from switokd.training.nonfinite import explained
from switokd.training.observer import Observer
from switokd.training.step import StepContext, train_step
from switokd.training.telemetry import RunCounts
from switokd.training.weights import check_finite, gather_weights


@dataclass(frozen=True)
class Trainer:
    """Trains the networks of one rank; every rank of the run runs its own trainer."""

    config: Config
    world: World
    images: Images
    batches: Iterator[Batch]
    context: StepContext
    clock: CheckpointClock
    observers: Sequence[Observer] = ()
    """Empty on all ranks but rank 0."""
    resumed: State | None = None
    """This rank's part of a checkpoint; the learners have its weights already."""
    _best: dict[str, float] = field(default_factory=dict, init=False)
    """By network: the best top-1 so far, in percent; on rank 0 only."""
    _skipped: list[int] = field(default_factory=list, init=False)
    """The last steps in a row that were skipped; the same on all ranks."""
    _counts: RunCounts = field(default_factory=RunCounts, init=False)

    @cached_property
    def _agreement(self) -> Agreement:
        placement = self.context.exchange.local_placement.placement
        return Agreement(placement, self.config.topology.pairs)

    def run(self) -> list[WaitingTimes]:
        """Train to the end and save the weights; return all ranks' waiting times on rank 0."""
        context = self.context
        learners, exchange, decider = context.learners, context.exchange, context.decider
        evaluator = Evaluator(learners, exchange.local_placement, self.images, self.world)
        held_out = HeldOut.of(self.images, self.config.method.strategy, exchange)
        last, per_epoch = total_steps(self.config, self.images), self.images.steps_per_epoch
        done = self._restore()
        ACTIVITY.begin(Phase.LOADING, done)
        for observer in self.observers:
            observer.on_begin()
        if done:  # the rest of the epoch, or its evaluation alone
            epoch = (done - 1) // per_epoch
            end = min((epoch + 1) * per_epoch, last)
            self._epoch(epoch, range(done + 1, end + 1), evaluator, self.resumed)
            done = end
        for first in range(done + 1, last + 1, per_epoch):
            held_out.observe(learners, first)
            end = min(first + per_epoch, last + 1)
            self._epoch((first - 1) // per_epoch, range(first, end), evaluator)
        self.save_weights("weights", averages=True)
        waiting_times = self.world.gather(self._waiting_times)
        decider.close()
        return waiting_times

    def _epoch(
        self, epoch: int, steps: range, evaluator: Evaluator, resumed: State | None = None
    ) -> None:
        """Train one epoch; evaluate the networks if the run file asks for it in this epoch.

        resumed: the state that another process has left in the middle of the epoch.
        """
        log = self._train(epoch, steps, resumed)
        end = steps.stop - 1
        if steps:
            ACTIVITY.begin(Phase.DECIDING, end)
            self.context.decider.settle(end)
        ACTIVITY.begin(Phase.EVALUATING, end)
        is_last = end == total_steps(self.config, self.images)
        is_tested = is_last or (epoch + 1) % self.config.schedule.evaluate_every == 0
        if is_tested:
            check_finite(self.context.learners, self.world.rank)
            evaluator.test(log)
        warned = WARNINGS.take() if self.world.rank else []  # rank 0 keeps its own itself
        gathered = self.world.gather((log.rows(), warned))
        rows = [row for rank_rows, _ in gathered for row in rank_rows]
        WARNINGS.add(warning for _, warnings in gathered for warning in warnings)
        improved = self._publish(epoch, end, rows) if self.world.rank == 0 else None
        if is_tested:
            # Only rank 0 has the complete test results.
            improved = self.world.broadcast(improved)
            if improved:
                self.save_weights("weights/best", improved)

    def _train(self, epoch: int, steps: range, resumed: State | None) -> EpochLog:
        """Run the steps of an epoch; return this rank's measurements."""
        context, exchange = self.context, self.context.exchange
        last, per_epoch = total_steps(self.config, self.images), self.images.steps_per_epoch
        counts = self._counts.begin(epoch, last, per_epoch) if self.world.rank == 0 else None
        placement, device = exchange.local_placement, self.world.device
        log = EpochLog(context.learners, placement, context.decider, device, counts)
        if resumed:
            log.load_state_dict(resumed["epoch"])
        for step in steps:
            for learner in context.learners:
                set_learning_rate(self.config, learner, step, per_epoch)
            ACTIVITY.begin(Phase.LOADING, step)
            x, y = next(self.batches)
            n = self.images.size_of(step - 1)
            exchange.ask(self.clock.request, self._agreement.applied)
            try:
                result = train_step(context, step, x, y, n)
            except NonFiniteError as error:
                part = exchange.local_placement.part(n)
                self._skip(explained(error, step, x, part, self.images, self.world), step)
            else:
                self._agreement.check(step - 1, exchange.applied)
                self._agreement.note(result.applied)
                with exchange.watched(gradient_sum(step)):
                    log.add(result, n)
                for observer in self.observers:
                    observer.on_step(step, epoch, result)
            asked = self.clock.obey(step, exchange.asked)
            if self.clock.is_due(step, asked, step == last):
                self._save_checkpoint(step, log)
            if Request.STOP in asked:
                self._end(step)
        with exchange.watched(gradient_sum(steps.stop - 1)):
            log.end_of_training()
        return log

    def _skip(self, error: NonFiniteError, step: int) -> None:
        """Undo a step on all ranks; raise the error if steps must not be skipped, or no more."""
        guard, limit = self.context.guard, self.config.schedule.max_skipped
        if guard is None or not guard.skips:
            raise error from None
        before = self._skipped if self._skipped[-1:] == [step - 1] else []
        if len(before) >= limit:
            raise NonFiniteError(
                f"{error}. The {limit} steps before it were skipped already (schedule.max_skipped)"
            ) from None
        guard.undo()
        self._agreement.note({})
        self._skipped[:] = [*before, step]
        self._counts.skipped_steps += 1
        for observer in self.observers:
            observer.on_skipped(step, str(error))

    def _save_checkpoint(self, step: int, log: EpochLog) -> None:
        """Collect the state of all ranks, and hand it to the observers on rank 0."""
        context, world = self.context, self.world
        ACTIVITY.begin(Phase.SAVING, step)
        context.decider.settle(step)  # the checkpoint goes with a record that is complete
        check_finite(context.learners, world.rank)
        local_placement = context.exchange.local_placement
        with context.exchange.watched(gradient_sum(step)):
            part = capture(context.learners, local_placement)
            part["epoch"] = log.state_dict()
        part["waiting"] = self._waiting_times.state_dict()
        parts = world.gather(part)
        if parts:
            strategy = copied(self.config.method.strategy.state_dict())
            run = {"strategy": strategy, "best": dict(self._best), "skipped": [*self._skipped]}
            state = SavedState(step, local_placement.placement, parts, run).state_dict()
            for observer in self.observers:
                observer.on_checkpoint(step, state)
        self._counts.checkpoints += 1
        self.clock.saved()

    def _end(self, step: int) -> NoReturn:
        """Raise Preempted on all ranks, as soon as record and checkpoint are on the disk."""
        self.context.decider.settle(step)
        self.world.on_rank_0(lambda: _settle(self.observers))
        ignore_sigterm()
        raise self.clock.end(step)

    def _restore(self) -> int:
        """Restore what belongs to the loop; return the number of steps that are done."""
        if self.resumed is None:
            return 0
        run = self.resumed["run"]
        self._best.update(run["best"])
        self._skipped.extend(run.get("skipped", []))
        self.config.method.strategy.load_state_dict(run["strategy"])
        return int(self.resumed["step"])

    @property
    def _waiting_times(self) -> WaitingTimes:
        before = self.resumed["waiting"] if self.resumed else None
        return WaitingTimes.of(self.context.exchange, self.context.decider, before)

    def _publish(self, epoch: int, step: int, rows: Sequence[Row]) -> list[str]:
        """Hand an epoch's metrics to the observers; return the networks with a new best top-1."""
        metrics = EpochMetrics.of(epoch, step, self.config.topology, rows)
        for observer in self.observers:
            observer.on_epoch(metrics)
        for name, top1 in metrics.test_top1.items():
            self.context.decider.progress(NetworkProgress(name, test_accuracy=top1 / 100))
        best, top1s = self._best, metrics.test_top1.items()
        improved = {name: top1 for name, top1 in top1s if top1 > best.get(name, -1.0)}
        best.update(improved)
        return list(improved)

    def save_weights(
        self, folder: str, names: Collection[str] | None = None, averages: bool = False
    ) -> None:
        """Hand networks' weights to the observers, which save them in `folder`.

        names: the networks to save; None: all. averages: whether to save moving averages too.
        """
        ACTIVITY.begin(Phase.SAVING)
        placement = self.context.exchange.local_placement.placement
        states = gather_weights(self.context.learners, placement, self.world, names, averages)
        for observer in self.observers:
            observer.on_weights(folder, states)


def _settle(observers: Sequence[Observer]) -> None:
    for observer in observers:
        observer.settle()


def total_steps(config: Config, images: Images) -> int:
    """Return the number of steps of the whole run."""
    steps = config.schedule.epochs * images.steps_per_epoch
    return min(steps, config.schedule.max_steps or steps)
