"""What the live metrics show beside losses and accuracies: the terms of a loss, counts of the run.

Not covered: when it is sent (`meters.py`); what a rank is doing (`runtime/phase.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from switokd.coordination.progress import LossTerm, RunProgress, TermKind
from switokd.distillation.losses import loss_terms
from switokd.runtime.placement import LocalPlacement
from switokd.training.step import StepResult


@dataclass
class RunCounts:
    """What rank 0 counts of the run since its process began."""

    epoch: int = 0
    """The epoch that goes on, counted from 0."""
    skipped_steps: int = 0
    checkpoints: int = 0
    planned_steps: int = 0
    """Of the whole training."""
    planned_epochs: int = 0

    def begin(self, epoch: int, steps: int, steps_per_epoch: int) -> RunCounts:
        """Note that an epoch begins; return these counts. steps: of the whole training."""
        self.epoch = epoch
        self.planned_steps, self.planned_epochs = steps, -(-steps // steps_per_epoch)
        return self

    def progress(self) -> RunProgress:
        """Return them as they are sent."""
        return RunProgress(
            self.epoch + 1,
            self.skipped_steps,
            self.checkpoints,
            self.planned_steps,
            self.planned_epochs,
        )


@torch.no_grad()
def terms_of(network: str, result: StepResult, placement: LocalPlacement, n: int) -> list[LossTerm]:
    """Return the terms of a network's loss in a step, over this rank's shard of `n` samples.

    Empty if the network was paused, or has no sample here. Waits for the device.
    """
    shard = placement.shard(network, n)
    if network not in result.losses or shard.stop == shard.start:
        return []
    terms = result.terms.get(network, ())
    peers = {term.peer: result.peers[term.peer][shard] for term in terms}
    values = loss_terms(result.logits[network][shard], result.y[shard], peers, terms)
    numbers = torch.stack([value.double() for value in values]).tolist()
    found = [LossTerm(TermKind.TASK, numbers[0])]
    for term, number in zip(terms, numbers[1:], strict=True):
        if term.peer in result.logits:
            found.append(LossTerm(TermKind.PEER, number, term.peer))
        else:
            found.append(LossTerm(TermKind.COMBINED, number))
    return found
