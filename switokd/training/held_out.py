"""What a strategy learns from images that nobody trains on, before each epoch.

Every rank forwards its shards of them, in evaluation mode and without augmentation; the logits
travel as a step's do; and the strategy of every rank is told all of them, so that all strategies
come to the same.

Not covered: which images these are (`data/__init__.py`); what is made of them (`strategies/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switokd.data.images import Images
from switokd.data.loader import Batches
from switokd.distillation.strategies.base import Strategy
from switokd.training.exchange import Exchange
from switokd.training.learner import Learner


@dataclass(frozen=True)
class HeldOut:
    """The images held out, for one rank. `batches`: its part of them, None where there are none."""

    batches: Batches | None
    sizes: Sequence[int]
    """Images of each batch, of which the rank loads its part."""
    strategy: Strategy
    exchange: Exchange
    """One for labels: these targets are never softened."""

    @classmethod
    def of(cls, images: Images, strategy: Strategy, exchange: Exchange) -> HeldOut:
        """Prepare to tell `strategy`, with an exchange of the training's place and group."""
        n, size = images.held_out, images.config.batch_size
        sizes = [min(size, n - begin) for begin in range(0, n, size)]
        batches = images.held_out_batches(exchange.place.part) if n else None
        return cls(batches, sizes, strategy, exchange.for_labels())

    @torch.no_grad()
    def observe(self, learners: Sequence[Learner], step: int) -> None:
        """Tell the strategy all networks' logits, if it wants them; every rank must call it.

        step: the one that comes next. NonFiniteError or PeerError as in a step.
        """
        if self.batches is None:
            return
        modes = {learner.name: learner.model.training for learner in learners}
        for learner in learners:
            learner.model.eval()
        batches = zip(self.batches, self.sizes, strict=True)
        told = [self._forward(learners, step, x, y, n) for (x, y), n in batches]
        for learner in learners:
            learner.model.train(modes[learner.name])
        names = self.exchange.place.placement.networks
        logits = {name: torch.cat([z[name] for z, _ in told]) for name in names}
        self.strategy.observe(logits, torch.cat([y for _, y in told]))

    def _forward(
        self, learners: Sequence[Learner], step: int, x: Tensor, y: Tensor, n: int
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """All networks' logits and the labels of one batch of `n`; x and y: this rank's part."""
        device, place = next(learners[0].model.parameters()).device, self.exchange.place
        x, y = x.to(device), y.to(device)
        mine = {learner.name: place.local(learner.name, n) for learner in learners}
        z = {li.name: li.predict(x[mine[li.name]]) for li in learners if len(x[mine[li.name]])}
        everyone = self.exchange(step, z, {name: y[shard] for name, shard in mine.items()}, n)
        self.exchange.check(everyone.health.tolist())
        return everyone.logits, everyone.y
