"""Top-1 accuracy on the test set, or on one rank's part of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import torch
from torch import Tensor, nn

from switokd.data.images import Images
from switokd.errors import UsageError
from switokd.runtime.phase import ACTIVITY
from switokd.runtime.placement import LocalPlacement
from switokd.runtime.process_group import World
from switokd.training.batch_norm import average_statistics
from switokd.training.learner import Learner
from switokd.training.meters import EpochLog


@torch.no_grad()  # a network may keep a tensor for its training, unlike one of inference mode
def top1(
    learner: Learner,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    model: nn.Module | None = None,
    numbers: Iterable[int] | None = None,
) -> tuple[int, int]:
    """Return the number of images classified correctly, and the number of images.

    UsageError if the network returns logits of another number of images. The model's mode (training
    or evaluation) is the same afterwards. model: the model to use instead of the learner's trained
    one, for example its moving average. numbers: of the batches in the test set, on which random
    numbers of a network depend; None: 0, 1, ...
    """
    model = model or learner.model
    was_training = model.training
    model.eval()
    correct, samples = torch.zeros((), dtype=torch.long, device=device), 0
    for number, (x, y) in zip(numbers or count(), batches, strict=False):
        z = learner.predict(x.to(device), model, number)
        if len(z) != len(y):
            raise UsageError(
                f"network {learner.name}: in evaluation the model must return logits of all "
                f"{len(y)} images, got {tuple(z.shape)}",
                every_rank=False,
            )
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
        self._batches, self._turns, self._shares = {}, {}, {}
        batch_size = images.size_of(0)
        for learner in learners:
            ranks = local_placement.placement.ranks_of(learner.name)
            index = ranks.index(world.rank)
            self._batches[learner.name] = images.test(index=index, of=len(ranks))
            self._turns[learner.name] = index, len(ranks)
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
            tests = (learner.model, log.tested), (learner.averaged, log.tested_average)
            for tested_model, tested in tests:
                if tested_model is not None:
                    numbers = count(*self._turns[name])
                    tested(name, *top1(learner, batches, self._device, tested_model, numbers))
