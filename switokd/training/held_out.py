"""Shows a strategy all networks' logits on held-out images, before each epoch.

No network trains on these images. Every rank computes the logits of its shards in evaluation mode
and without augmentation. The logits are exchanged as in a training step, so the strategies of all
ranks observe the same values and stay equal.

Not covered: the choice of the images (`data/images.py`); what a strategy does with the logits
(`strategies/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switokd.data.augment import mix_one, seed_generators
from switokd.data.images import Images
from switokd.data.loader import Batches
from switokd.distillation.strategies.base import Strategy
from switokd.runtime.phase import ACTIVITY, Phase
from switokd.training.exchange import Exchange
from switokd.training.learner import Learner

OBSERVE = 2**40
"""Marks the random numbers of `Strategy.observe`."""


@dataclass(frozen=True)
class HeldOut:
    """One rank's part of the held-out images."""

    batches: Batches | None
    """None if no images are held out."""
    sizes: Sequence[int]
    """Number of images of each whole batch."""
    strategy: Strategy
    exchange: Exchange
    """For labels, because the targets of held-out images are never softened."""
    seed: int = 0
    """The run's seed, for random numbers of the strategy."""

    @classmethod
    def of(cls, images: Images, strategy: Strategy, exchange: Exchange) -> HeldOut:
        """Prepare the held-out images for `strategy`; exchange: that of the training steps."""
        n, size = images.held_out, images.config.batch_size
        sizes = [min(size, n - begin) for begin in range(0, n, size)]
        batches = images.held_out_batches(exchange.local_placement.part) if n else None
        return cls(batches, sizes, strategy, exchange.for_labels(), images.seed)

    @torch.no_grad()
    def observe(self, learners: Sequence[Learner], step: int) -> None:
        """Show the strategy all networks' logits, if images are held out; call this on every rank.

        step: number of the next training step. NonFiniteError or PeerError as in a step.
        """
        if self.batches is None:
            return
        ACTIVITY.begin(Phase.EVALUATING, step - 1)
        modes = {learner.name: learner.model.training for learner in learners}
        for learner in learners:
            learner.model.eval()
        batches = zip(self.batches, self.sizes, strict=True)
        gathered = [self._forward(learners, step, x, y, n) for (x, y), n in batches]
        for learner in learners:
            learner.model.train(modes[learner.name])
        names = self.exchange.local_placement.placement.networks
        logits = {name: torch.cat([z[name] for z, _ in gathered]) for name in names}
        y = torch.cat([y for _, y in gathered])
        seed_generators(mix_one(self.seed, step, OBSERVE), y.device)
        self.strategy.observe(logits, y)

    def _forward(
        self, learners: Sequence[Learner], step: int, x: Tensor, y: Tensor, n: int
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return all networks' logits and labels of a batch of `n`; x and y: this rank's part."""
        placement = self.exchange.local_placement
        device = next(learners[0].model.parameters()).device
        x, y = x.to(device), y.to(device)
        loaded = {learner.name: placement.local(learner.name, n) for learner in learners}
        z = {
            li.name: li.predict_parts(x[loaded[li.name]], placement.parts(li.name, n))
            for li in learners
            if len(x[loaded[li.name]])
        }
        gathered = self.exchange(step, z, {name: y[part] for name, part in loaded.items()}, n)
        self.exchange.check(gathered.health.tolist())
        return gathered.logits, gathered.y
