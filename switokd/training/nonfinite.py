"""Finds values that are not finite before a step is applied, and lets all ranks skip the step.

Logits reach every rank, so every rank finds them (`exchange.py`). A loss, a gradient or a buffer is
seen by the ranks of its network only. With `schedule.on_nonfinite: skip` a small collective tells
all ranks before any of them changes a weight. With `stop` the rank that has found something ends
the run, and nothing is sent.

Not covered: gradients on a GPU with `stop`, where reading them would wait for the device; gradients
with a loss scaler (fp16), which skips the update of its network by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from switokd.errors import NonFiniteError
from switokd.models.given_weights import is_mask
from switokd.training.optimizer import are_finite

if TYPE_CHECKING:
    from switokd.data.images import Images
    from switokd.runtime.process_group import World
    from switokd.training.exchange import Exchange
    from switokd.training.learner import Learner

KINDS = ("a loss", "a gradient", "a buffer")
"""What a rank may find in its own networks, in this order."""


@dataclass
class Guard:
    """Looks at the losses, gradients and buffers of one rank's networks in every step."""

    learners: Sequence[Learner]
    exchange: Exchange
    skips: bool = False
    """Whether all ranks skip a step together; else the rank that finds something ends the run."""
    _buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    """The networks' buffers, and their values before the step."""
    _masks: dict[str, set[str]] = field(default_factory=dict, init=False)
    """By network: names of buffers in which -inf is meant."""
    _flat: dict[str, list[Tensor]] = field(default_factory=dict, init=False)
    """By network: its buffers as they are looked at in every step; listing them takes longer."""

    def begin(self) -> None:
        """Remember the buffers before a step, so that `undo` can restore them."""
        if self.skips:
            buffers = [b for learner in self.learners for b in learner.model.buffers()]
            self._buffers = [(buffer, buffer.clone()) for buffer in buffers]

    def check(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """NonFiniteError before a weight changes; if steps are skipped, on all ranks together.

        losses: by network, this rank's share of the loss.
        """
        if not self.skips:
            if found := self._found(losses):
                raise self._error(*found, self.exchange.local_placement.rank, step)
            return
        for learner in self.learners:
            if learner.optimizer_step.is_due(step):
                learner.optimizer_step.add_up()
        found = self._found(losses)
        for rank, theirs in enumerate(self.exchange.tell_all(found or (-1, -1), step)):
            if theirs[0] >= 0:
                raise self._error(theirs[0], theirs[1], rank, step, every_rank=True)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the buffers, and drop gradients that wait for their update."""
        for buffer, before in self._buffers:
            buffer.copy_(before)
        for learner in self.learners:
            learner.optimizer_step.drop()

    def _found(self, losses: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """Return the number of a network and of a kind, or None if everything is finite."""
        names = self.exchange.local_placement.placement.networks
        for learner in self.learners:
            is_on_gpu = next(learner.model.parameters()).is_cuda
            if is_on_gpu and not self.skips:
                continue
            step = learner.optimizer_step
            loss = [losses[learner.name]] if learner.name in losses else []
            gradients = step.gradients if self.skips and step.scaler is None else []
            for kind, values in enumerate((loss, gradients)):
                if not are_finite(values):
                    return names.index(learner.name), kind
            if not self._are_buffers_finite(learner):
                return names.index(learner.name), KINDS.index("a buffer")
        return None

    def _are_buffers_finite(self, learner: Learner) -> bool:
        """Look at a network's buffers, and at most once at which of them are masks."""
        if are_finite(self._buffers_of(learner)):
            return True
        masks = {name for name, buffer in learner.model.named_buffers() if is_mask(buffer)}
        if masks == self._masks.get(learner.name, set()):
            return False
        self._masks[learner.name] = masks
        self._flat.pop(learner.name, None)
        return are_finite(self._buffers_of(learner))

    def _buffers_of(self, learner: Learner) -> list[Tensor]:
        """Return a network's buffers as one tensor; with `skips` one by one, also replaced ones."""
        masks = self._masks.get(learner.name, ())
        named = learner.model.named_buffers()
        if self.skips:
            return [buffer for name, buffer in named if name not in masks]
        if learner.name not in self._flat:
            buffers = [b for name, b in named if b.is_floating_point() and name not in masks]
            self._flat[learner.name] = [b.view(-1) for b in buffers if b.is_contiguous()]
        flat = self._flat[learner.name]
        return [torch.cat(flat)] if flat else []

    def _error(
        self, network: int, kind: int, rank: int, step: int, every_rank: bool = False
    ) -> NonFiniteError:
        name = self.exchange.local_placement.placement.networks[network]
        return NonFiniteError(
            f"network {name} (rank {rank}) has {KINDS[kind]} that is not finite at step {step}; it "
            f"was not applied. The usual remedy is a lower networks.{name}.optimizer.lr, or "
            f"networks.{name}.clip_norm",
            every_rank=every_rank,
        )


def explained(
    error: NonFiniteError, step: int, x: Tensor, part: slice, images: Images, world: World
) -> NonFiniteError:
    """Return the error, or one that names the images if these are the cause.

    x: images `[b, ...]` of this rank. part: their positions in the batch of the step.
    """
    if not error.seen_by_every_rank:
        return error
    bad = (~x.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    positions = sorted(set().union(*world.all_gather({part.start + i for i in bad})))
    if not positions:
        return error
    indices = [images.index_of(step - 1, position) for position in positions]
    names = ", ".join(map(str, indices[:3])) + (", ..." if len(indices) > 3 else "")
    which = f"image {names} has" if len(indices) == 1 else f"images {names} have"
    return NonFiniteError(
        f"training {which} values that are not finite (used at step {step}, which was not "
        f"applied): repair {images.config.dataset}, or leave them out"
    )
