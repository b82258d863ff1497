"""The moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from switokd.errors import UsageError, first_line


class MovingAverage:
    """A copy of a model that follows it, a share of 1 - `decay` of the way per update.

    BatchNorm's statistics are averaged like the weights, so that the two fit each other; whole
    numbers are taken over. So is the first update, all of it.

    PyTorch's AveragedModel has its count of updates on the CPU and brings it to the GPU for each,
    which waits for all that the GPU has to do before.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self._mix = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._is_new = True

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Note an update of `model`."""
        mixed: tuple[list[Tensor], list[Tensor]] = [], []
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        for mine, its in zip(ours, theirs, strict=True):
            if self._is_new or not (mine.is_floating_point() or mine.is_complex()):
                mine.copy_(its)
            else:
                mixed[0].append(mine)
                mixed[1].append(its)
        if mixed[0]:
            self._mix(*mixed, None)
        self._is_new = False


def moving_average(name: str, model: nn.Module, decay: float) -> MovingAverage:
    """Give a model's; `name` is for UsageError, if the model cannot be copied."""
    try:
        return MovingAverage(model, decay)
    except Exception as error:
        usage = UsageError(
            f"schedule.ema_decay: the average starts as a copy of {name}, which cannot be copied: "
            f"{first_line(error)}; leave ema_decay out, or mend the model's __deepcopy__"
        )
        usage.seen_by_every_rank = False
        raise usage from error
