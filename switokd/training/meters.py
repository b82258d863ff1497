"""Measurements of one rank during training: losses, accuracies, pauses, seconds.

Not covered: sums over a network's ranks (`metrics.py`), showing them (`progress.py`, `curves.py`),
writing them (`run_folder.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from switokd.coordination.decider import Decider
from switokd.coordination.progress import LossTerm, NetworkProgress
from switokd.distillation.distances import on_grid
from switokd.runtime.placement import LocalPlacement
from switokd.training.exchange import Exchange
from switokd.training.learner import Learner
from switokd.training.step import StepResult
from switokd.training.telemetry import RunCounts, terms_of

SEND_SECONDS = 0.5
"""Interval at which live metrics are sent; only then a number of theirs is read from the device."""
LOSS_GRID = 2.0**-24
"""With micro-batches, losses are rounded to multiples: sums over an epoch are exact up to 2^29."""


class Meter:
    """Training loss and accuracy over this rank's shards of one network.

    The loss stays on the device until `sums` reads it.
    """

    def __init__(self, name: str, placement: LocalPlacement, device: torch.device) -> None:
        self._name, self._placement = name, placement
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._samples = self._learned = self._correct = 0

    def add(self, result: StepResult, n: int) -> None:
        """Add the result of one step with a batch of `n` samples."""
        shard = self._placement.shard(self._name, n)
        size = shard.stop - shard.start
        self._samples += size
        self._correct += result.correct[self._name]
        if self._name in result.losses:
            loss = result.losses[self._name]
            if self._placement.placement.micro_batches > 1:
                self._loss.add_(on_grid(n * loss.double(), LOSS_GRID).sum())
            else:
                self._loss.add_(loss, alpha=n)  # mean over n samples -> sum
            self._learned += size

    def restore(self, sums: Sums) -> None:
        """Continue from the sums of an earlier process."""
        self._loss.fill_(sums.loss)
        self._correct, self._learned, self._samples = int(sums.correct), sums.learned, sums.samples

    def sums(self) -> Sums:
        """Return the sums over all steps so far; waits for the device."""
        return Sums(self._loss.item(), self._correct, self._learned, self._samples)


class Sums(NamedTuple):
    """Sums over samples: `loss` over the `learned` samples, `correct` over all `samples`.

    A sample is learned if the network was not paused in the sample's step.
    """

    loss: float = 0.0
    correct: float = 0.0
    learned: int = 0
    samples: int = 0

    def since(self, before: Sums) -> Sums:
        """Return the difference to earlier sums."""
        return Sums(*(now - then for now, then in zip(self, before, strict=True)))  # type: ignore[arg-type]

    @property
    def mean_loss(self) -> float | None:
        """Mean loss; None if no sample was learned."""
        return self.loss / self.learned if self.learned else None

    @property
    def accuracy(self) -> float | None:
        """Accuracy from 0 to 1; None without samples."""
        return self.correct / self.samples if self.samples else None


class ProgressSender:
    """Sends one network's numbers at regular intervals.

    placement: of this rank. counts: of the run, on rank 0.
    """

    def __init__(
        self,
        decider: Decider,
        meter: Meter,
        learner: Learner,
        placement: LocalPlacement,
        counts: RunCounts | None = None,
    ) -> None:
        self._decider, self._meter, self._learner = decider, meter, learner
        self._placement, self._counts = placement, counts
        self._sent, self._sent_at = Sums(), time.monotonic()
        self._learning_seconds = learner.timer.seconds
        """The network's timer when its numbers were sent last."""
        self._steps = self._paused = 0
        """Since then."""
        self._last: tuple[StepResult, int] | None = None
        """Result and batch size of the last step since then."""

    def restart(self) -> None:
        """Send only what comes after: an earlier process has sent what the meter has."""
        self._sent = self._meter.sums()

    def add(self, result: StepResult, n: int) -> None:
        """Note a step with a batch of `n` samples; send if `SEND_SECONDS` have passed."""
        self._steps += 1
        self._paused += self._learner.name in result.paused
        self._last = result, n
        if time.monotonic() - self._sent_at >= SEND_SECONDS:
            self.send()

    def send(self) -> None:
        """Send the means over the samples since the last time, and the last step's loss terms."""
        if not self._decider.has_metrics:
            self._sent_at = time.monotonic()
            return
        learner, sums = self._learner, self._meter.sums()
        new, seconds = sums.since(self._sent), learner.timer.seconds
        now = time.monotonic()
        progress = NetworkProgress(
            learner.name,
            new.samples,
            new.mean_loss,
            new.accuracy,
            learning_rate=float(learner.optimizer.param_groups[0]["lr"]),
            gradient_norm=learner.optimizer_step.norm.take(),
            loss_terms=self._loss_terms(),
            training_seconds=now - self._sent_at,
            learning_seconds=seconds - self._learning_seconds,
            learned_steps=self._steps - self._paused,
            paused_steps=self._paused,
            run=self._counts.progress() if self._counts else None,
        )
        self._decider.progress(progress)
        self._sent, self._sent_at, self._learning_seconds = sums, now, seconds
        self._steps = self._paused = 0
        self._last = None

    def _loss_terms(self) -> Sequence[LossTerm]:
        if self._last is None:
            return ()
        result, n = self._last
        return terms_of(self._learner.name, result, self._placement, n)


class EpochLog:
    """Measurements of one rank in one epoch, as one row per network of this rank."""

    def __init__(
        self,
        learners: Sequence[Learner],
        placement: LocalPlacement,
        decider: Decider,
        device: torch.device,
        counts: RunCounts | None = None,
    ) -> None:
        """Begin an epoch. counts: of the run, on rank 0."""
        self._learners = {learner.name: learner for learner in learners}
        self._device = device
        self._meters = {name: Meter(name, placement, device) for name in self._learners}
        self._senders = [
            ProgressSender(decider, self._meters[li.name], li, placement, counts) for li in learners
        ]
        self._paused = dict.fromkeys(self._learners, 0)
        self._tested: dict[str, tuple[int, int]] = {}
        self._tested_averages: dict[str, tuple[int, int]] = {}
        self._learning_seconds = {li.name: li.timer.seconds for li in learners}
        """Each network's timer at the beginning of the epoch."""
        self._steps = 0
        self._started = time.monotonic()
        self._seconds = 0.0

    def add(self, result: StepResult, n: int) -> None:
        """Add the result of one step with a batch of `n` samples."""
        self._steps += 1
        for name, meter in self._meters.items():
            meter.add(result, n)
            self._paused[name] += name in result.paused
        for sender in self._senders:
            sender.add(result, n)

    def end_of_training(self) -> None:
        """Stop the clock before the evaluation."""
        for sender in self._senders:
            sender.send()
        # On a GPU the last step's backward and optimizer step are still in the queue.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds = time.monotonic() - self._started

    def tested(self, name: str, correct: int, samples: int) -> None:
        """Store the test result of a network."""
        self._tested[name] = correct, samples

    def tested_average(self, name: str, correct: int, samples: int) -> None:
        """Store the test result of a network's moving average."""
        self._tested_averages[name] = correct, samples

    def sums(self) -> dict[str, Sums]:
        """Return each network's sums so far; waits for the device."""
        return {name: meter.sums() for name, meter in self._meters.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements of an epoch's training so far; waits for the device."""
        return {
            "steps": self._steps,
            "seconds": time.monotonic() - self._started,
            "networks": {
                name: {
                    "sums": list(sums),
                    "paused": self._paused[name],
                    "learning_seconds": self._learners[name].timer.seconds
                    - self._learning_seconds[name],
                }
                for name, sums in self.sums().items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an epoch that another process has begun."""
        self._steps = state["steps"]
        self._started -= state["seconds"]
        for name, network in state["networks"].items():
            self._meters[name].restore(Sums(*network["sums"]))
            self._paused[name] = network["paused"]
            self._learning_seconds[name] -= network["learning_seconds"]
        for sender in self._senders:
            sender.restart()

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per network, to be combined with the rows of the network's other ranks."""
        rows = []
        for name, sums in self.sums().items():
            learner = self._learners[name]
            rows.append(
                {
                    "network": name,
                    "role": learner.role.value,
                    "lr": learner.optimizer.param_groups[0]["lr"],
                    "steps_paused": self._paused[name],
                    "steps_learned": self._steps - self._paused[name],
                    "loss_sum": sums.loss,
                    "learned": sums.learned,
                    "correct": sums.correct,
                    "samples": sums.samples,
                    "tested": self._tested.get(name),  # (correct, samples), or None without a test
                    "tested_average": self._tested_averages.get(name),
                    "training_seconds": self._seconds,
                    "learning_seconds": learner.timer.seconds - self._learning_seconds[name],
                }
            )
        return rows


@dataclass(frozen=True)
class WaitingTimes:
    """Seconds that one rank waited for the other ranks' logits, and for each decision; and the
    steps for which it did not wait."""

    exchange_seconds: float | None
    """None if the exchange runs in a GPU's queue, where its duration is not measured."""
    decision_seconds: tuple[float, ...]
    alone_steps: tuple[int, ...] = ()
    """Steps that the rank has decided without the coordinator."""

    @classmethod
    def of(
        cls, exchange: Exchange, decider: Decider, before: Mapping[str, Any] | None = None
    ) -> WaitingTimes:
        """Read them. before: `state_dict` of an earlier process of the run."""
        seconds, waits = exchange.seconds, tuple(decider.waits)
        alone = tuple(decider.alone_steps)
        if before is not None:
            waits = (*before["decision_seconds"].tolist(), *waits)
            alone = (*before.get("alone_steps", ()), *alone)
            if before["exchange_seconds"] is not None:
                seconds = (seconds or 0.0) + before["exchange_seconds"]
        return cls(seconds, waits, alone)

    def state_dict(self) -> dict[str, Any]:
        """Return them for a checkpoint."""
        return {
            "exchange_seconds": self.exchange_seconds,
            "decision_seconds": torch.tensor(self.decision_seconds, dtype=torch.float64),
            "alone_steps": list(self.alone_steps),
        }
