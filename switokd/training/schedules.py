"""What a step's number alone decides: its learning rate, and which steps share an update.

Both are pure functions of the step, so that it does not matter how a run got there. Steps are
counted from 1, as in the record; epochs from 0. Torch-free.

Not covered: applying them (`build.py`, `optimizer.py`); schedules that look at the course of the
training (reducing on a plateau).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from switokd.config.sections import Schedule


def learning_rate(schedule: Schedule, base: float, step: int, steps_per_epoch: int) -> float:
    """One network's learning rate at `step`, where its optimizer's setting is `base`.

    Warm-up: at step i of w, i / w of what it is without. Multi-step: `base` times gamma for each
    milestone whose epoch is over. Cosine: half a period from `base` at the first step after the
    warm-up to `min_lr` where all epochs end; Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983,
    without restarts.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if schedule.name == "cosine":
        steps = max(schedule.epochs * steps_per_epoch - warmup, 1)
        passed = max(step - 1 - warmup, 0)
        height = (1 + math.cos(math.pi * passed / steps)) / 2
        rate = schedule.min_lr + (base - schedule.min_lr) * height
    else:
        epoch = (step - 1) // steps_per_epoch
        rate = base * schedule.gamma ** sum(epoch >= m for m in schedule.milestones)
    return rate * step / warmup if step < warmup else rate


@dataclass(frozen=True)
class AccumulationWindow:
    """Which steps share an update: every `every` of an epoch, from its first on.

    The last of an epoch, or of a run that ends in the middle of one, may be fewer, so that no
    gradient lives longer than an epoch.
    """

    every: int = 1
    steps_per_epoch: int = 1
    steps: int | None = None
    """Steps of the whole run; None: it ends with an epoch."""

    def of(self, step: int) -> range:
        """The steps that share an update with `step`, itself among them."""
        if self.every == 1:
            return range(step, step + 1)
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        first = step - position % self.every
        end = min(first + self.every, (epoch + 1) * self.steps_per_epoch + 1)
        return range(first, end if self.steps is None else min(end, self.steps + 1))
