"""Top-1 accuracy on the test set, or on one rank's part of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from switokd.data.images import Images
from switokd.runtime.phase import ACTIVITY
from switokd.runtime.placement import LocalPlacement
from switokd.runtime.process_group import World
from switokd.training.batch_norm import average_statistics
from switokd.training.learner import Learner
from switokd.training.meters import EpochLog


@torch.inference_mode()
def top1(
    learner: Learner,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    model: nn.Module | None = None,
) -> tuple[int, int]:
    """Return the number of images classified correctly, and the number of images.

    The model's mode (training or evaluation) is the same afterwards. model: the model to use
    instead of the learner's trained one, for example its moving average.
    """
    model = model or learner.model
    was_training = model.training
    model.eval()
    correct, samples = torch.zeros((), dtype=torch.long, device=device), 0
    for x, y in batches:
        z = learner.predict(x.to(device), model)
        correct += (z.argmax(dim=1) == y.to(device)).sum()
        samples += len(y)
        ACTIVITY.progress()
    model.train(was_training)
    return int(correct.item()), samples


class Evaluator:
    """Tests the networks of one rank; the ranks of a network share the test set's batches."""

    def __init__(
        self,
        learners: Sequence[Learner],
        local_placement: LocalPlacement,
        images: Images,
        world: World,
    ) -> None:
        self._learners, self._device, self._transport = learners, world.device, world.transport
        self._batches, self._shares = {}, {}
        batch_size = images.size_of(0)
        for learner in learners:
            ranks = local_placement.placement.ranks_of(learner.name)
            index = ranks.index(world.rank)
            self._batches[learner.name] = images.test(index=index, of=len(ranks))
            shard = local_placement.shard(learner.name, batch_size)
            self._shares[learner.name] = float((shard.stop - shard.start) / batch_size)

    def test(self, log: EpochLog) -> None:
        """Test all networks and their moving averages; write the results to `log`."""
        # All collectives first, because the ranks evaluate for unequal times.
        for learner in self._learners:
            if learner.buffers is not None:
                continue  # they are equal on all ranks
            for model in filter(None, (learner.model, learner.averaged)):
                average_statistics(learner, model, self._shares[learner.name], self._transport)
        for learner in self._learners:
            name, batches = learner.name, self._batches[learner.name]
            log.tested(name, *top1(learner, batches, self._device))
            if learner.averaged is not None:
                average = top1(learner, batches, self._device, learner.averaged)
                log.tested_average(name, *average)
