"""A run's numbers by name, as trackers write them: of decisions, of a batch, of an epoch.

    gap/TEACHER/STUDENT, threshold/..., margin/..., expert_share/...    means over some steps
    paused_share/TEACHER                                                over the same steps
    cross_entropy/NETWORK, batch_accuracy/NETWORK, kl/NETWORK/PEER      of one step's batch
    loss/NETWORK, train_accuracy/..., test_accuracy/..., lr/..., images_per_second/...   by epoch

Accuracies are in percent, shares from 0 to 1.

Not covered: writing them (the trackers).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from switokd.config.config import Config
from switokd.distillation.decision import Decision, Mode
from switokd.distillation.losses import kl
from switokd.training.metrics import EpochMetrics
from switokd.training.step import StepResult


class DecisionMeans:
    """Means over the decisions of some steps."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._steps = 0

    def add(self, decision: Decision) -> None:
        """Add the decision of one step."""
        self._steps += 1
        for p in decision.pairs:
            pair = f"{p.pair.teacher}/{p.pair.student}"
            for name, value in (
                ("gap", p.distances.gap),
                ("threshold", p.delta),
                ("margin", p.distances.gap - p.delta),
                ("expert_share", p.mode is Mode.EXPERT),
            ):
                self._sums[f"{name}/{pair}"] += value
            self._sums[f"paused_share/{p.pair.teacher}"] += 0.0
        for teacher in decision.paused:
            self._sums[f"paused_share/{teacher}"] += 1

    def take(self) -> dict[str, float]:
        """Return the means, and begin anew; empty if no decision was added."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        self._sums.clear()
        self._steps = 0
        return means


class BatchNumbers:
    """Losses and accuracies of one batch; computed on its device at once, and read later.

    The next step may overwrite the logits. To read the numbers now would wait for the device.
    """

    def __init__(self, config: Config, result: StepResult) -> None:
        self._names: list[str] = []
        values: list[Tensor] = []
        peers = [(p.student, p.teacher) for p in config.topology.pairs]
        peers += [(teacher, student) for student, teacher in peers]
        with torch.no_grad():
            for name, z in result.logits.items():
                self._names += [f"cross_entropy/{name}", f"batch_accuracy/{name}"]
                correct = z.argmax(dim=1) == result.labels
                values += [F.cross_entropy(z, result.y), 100 * correct.double().mean()]
            for name, peer in peers:
                tau = config.couplings.of(name, peer).tau
                self._names.append(f"kl/{name}/{peer}")
                values.append(kl(result.logits[peer], result.logits[name], tau))
            self._values = torch.stack([value.double() for value in values])

    def read(self) -> dict[str, float]:
        """Return the numbers by name; waits for the device."""
        return dict(zip(self._names, self._values.tolist(), strict=True))


def of_epoch(metrics: EpochMetrics) -> Mapping[str, float]:
    """Return the numbers of an epoch by name; those that the epoch lacks are left out."""
    numbers: dict[str, float | None] = {}
    for m in metrics.networks:
        for name, value in (
            ("loss", m.loss),
            ("train_accuracy", m.train_top1),
            ("test_accuracy", m.test_top1),
            ("test_accuracy_ema", m.test_top1_ema),
            ("lr", m.lr),
            ("images_per_second", m.samples_per_second),
        ):
            numbers[f"{name}/{m.network}"] = value
    return {name: value for name, value in numbers.items() if value is not None}
