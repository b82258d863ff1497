"""What a rank says of its networks now and then, for the metrics only.

Not covered: what the metrics make of it (`services/coordinator/measurements.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from switokd.v1 import coordinator_pb2 as pb

MOST_TERMS = 32
"""Terms of a loss that are sent, so that a message stays small."""


class TermKind(Enum):
    """What a term of a loss is. COMBINED: distillation from logits that the strategy combines."""

    TASK = pb.LossTerm.KIND_TASK
    PEER = pb.LossTerm.KIND_PEER
    COMBINED = pb.LossTerm.KIND_COMBINED


class LossTerm(NamedTuple):
    """A summand of a network's loss, with its weight. peer: the network of a PEER."""

    kind: TermKind
    value: float
    peer: str = ""


@dataclass(frozen=True)
class RunProgress:
    """What rank 0 says of the run. Counts are since its process began."""

    training_epoch: int
    """Counted from 1."""
    skipped_steps: int = 0
    checkpoints: int = 0
    planned_steps: int = 0
    """Of the whole training; 0: not known."""
    planned_epochs: int = 0


@dataclass(frozen=True)
class NetworkProgress:
    """A network's training on one rank since the last progress; None: not measured."""

    network: str
    samples: int = 0
    loss: float | None = None
    """Mean over the samples, as `accuracy`. Accuracies are from 0 to 1."""
    accuracy: float | None = None
    test_accuracy: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    """L2 norm of the mean gradient of an optimizer step, before it is clipped."""
    loss_terms: Sequence[LossTerm] = ()
    """Of this step; none if the network was paused."""
    training_seconds: float = 0.0
    learning_seconds: float = 0.0
    """Of backward passes and optimizer steps."""
    learned_steps: int = 0
    paused_steps: int = 0
    run: RunProgress | None = None
    """On rank 0."""

    def to_wire(self, step: int) -> pb.Progress:
        """Return the message. step: the last one that was reported."""
        return pb.Progress(
            step=step,
            network=self.network,
            samples=self.samples,
            loss=self.loss,
            accuracy=self.accuracy,
            test_accuracy=self.test_accuracy,
            learning_rate=self.learning_rate,
            gradient_norm=self.gradient_norm,
            loss_terms=[
                pb.LossTerm(
                    kind=pb.LossTerm.Kind.ValueType(term.kind.value),
                    peer=term.peer,
                    value=term.value,
                )
                for term in self.loss_terms[:MOST_TERMS]
            ],
            training_seconds=self.training_seconds,
            learning_seconds=self.learning_seconds,
            learned_steps=self.learned_steps,
            paused_steps=self.paused_steps,
            run=None
            if self.run is None
            else pb.RunProgress(
                training_epoch=self.run.training_epoch,
                skipped_steps=self.run.skipped_steps,
                checkpoints=self.run.checkpoints,
                planned_steps=self.run.planned_steps,
                planned_epochs=self.run.planned_epochs,
            ),
        )
