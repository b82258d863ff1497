"""What each rank measures while it trains: losses, accuracies, pauses, seconds.

Not covered: showing it (`progress.py`, `curves.py`), keeping it (`run_folder.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from switokd.coordination.client import Client
from switokd.coordination.local import LocalDecider
from switokd.runtime.placement import LocalPlacement
from switokd.training.exchange import Exchange
from switokd.training.learner import Learner
from switokd.training.step import StepResult

FEED_SECONDS = 0.5


class Meter:
    """Training loss and accuracy over this rank's shards of one network.

    The loss stays on the device until it is read.
    """

    def __init__(self, name: str, place: LocalPlacement, device: torch.device) -> None:
        self._name, self._place = name, place
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self.samples = self.learned = self.correct = 0

    def add(self, result: StepResult, n: int) -> None:
        """Count one step's batch of `n`."""
        shard = self._place.shard(self._name, n)
        size = shard.stop - shard.start
        self.samples += size
        self.correct += result.correct[self._name]
        if self._name in result.losses:
            self._loss.add_(result.losses[self._name], alpha=n)  # its part of the batch's sum
            self.learned += size

    def sums(self) -> Sums:
        """All so far; waits for the device."""
        return Sums(self._loss.item(), self.correct, self.learned, self.samples)


class Sums(NamedTuple):
    """Loss over the samples learned from, correct answers over all samples."""

    loss: float = 0.0
    correct: float = 0.0
    learned: int = 0
    samples: int = 0

    def since(self, before: Sums) -> Sums:
        """What has come in since then."""
        return Sums(*(now - then for now, then in zip(self, before, strict=True)))  # type: ignore[arg-type]

    @property
    def mean_loss(self) -> float | None:
        """None where nothing was learned from."""
        return self.loss / self.learned if self.learned else None

    @property
    def accuracy(self) -> float | None:
        """None where there were no samples."""
        return self.correct / self.samples if self.samples else None


class MetricsFeed:
    """Sends what a meter has counted to the coordinator, every half a second."""

    def __init__(self, decider: Client | LocalDecider, meter: Meter, name: str) -> None:
        self._decider, self._meter, self._name = decider, meter, name
        self._sent, self._since = Sums(), time.monotonic()

    def send_if_due(self) -> None:
        """Send if it is time."""
        if time.monotonic() - self._since >= FEED_SECONDS:
            self.send()

    def send(self) -> None:
        """Send what has been counted since the last time."""
        sums = self._meter.sums()
        new = sums.since(self._sent)
        self._decider.progress(self._name, new.samples, new.mean_loss, new.accuracy)
        self._sent, self._since = sums, time.monotonic()


class EpochLog:
    """What one rank knows of an epoch, a row for each of its networks."""

    def __init__(
        self,
        learners: Sequence[Learner],
        place: LocalPlacement,
        decider: Client | LocalDecider,
        device: torch.device,
    ) -> None:
        self._learners = {learner.name: learner for learner in learners}
        self._device = device
        self._meters = {name: Meter(name, place, device) for name in self._learners}
        self._feeds = [MetricsFeed(decider, meter, name) for name, meter in self._meters.items()]
        self._paused = dict.fromkeys(self._learners, 0)
        self._tested: dict[str, tuple[int, int]] = {}
        self._tested_averages: dict[str, tuple[int, int]] = {}
        self._learning = {li.name: li.learning.seconds for li in learners}
        self._steps = 0
        self._started = time.monotonic()
        self._seconds = 0.0

    def add(self, result: StepResult, n: int) -> None:
        """Count one step."""
        self._steps += 1
        for name, meter in self._meters.items():
            meter.add(result, n)
            self._paused[name] += name in result.paused
        for feed in self._feeds:
            feed.send_if_due()

    def end_of_training(self) -> None:
        """Stop the clock: what follows is evaluation."""
        for feed in self._feeds:
            feed.send()
        # A GPU runs behind: the last step's backward and update are still in its queue.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds = time.monotonic() - self._started

    def tested(self, name: str, correct: int, samples: int) -> None:
        """Keep one network's test result."""
        self._tested[name] = correct, samples

    def tested_average(self, name: str, correct: int, samples: int) -> None:
        """Keep the test result of one network's moving average."""
        self._tested_averages[name] = correct, samples

    def rows(self) -> list[dict[str, Any]]:
        """Sums, to be added up with those of the network's other ranks."""
        rows = []
        for name, meter in self._meters.items():
            sums = meter.sums()
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
                    "tested": self._tested.get(name),  # (correct, samples), None: not in this epoch
                    "tested_average": self._tested_averages.get(name),
                    "training_seconds": self._seconds,
                    "learning_seconds": learner.learning.seconds - self._learning[name],
                }
            )
        return rows


@dataclass(frozen=True)
class WaitingTimes:
    """How long one rank stood still: for the others' logits, and for decisions.

    The exchange is not measured where it runs in a GPU's queue.
    """

    exchange_seconds: float | None
    decision_seconds: tuple[float, ...]

    @classmethod
    def of(cls, exchange: Exchange, decider: Client | LocalDecider) -> WaitingTimes:
        """Read both at the end of a run."""
        return cls(exchange.seconds, tuple(decider.waits))
