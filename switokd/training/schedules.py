"""The learning rate of each step, and the accumulation window that each step belongs to.

Both are pure functions of the step number, so a run needs no other state to continue. Steps are
counted from 1, as in the decision log; epochs are counted from 0. This module needs no torch.

Not covered: applying the learning rate and the window (`build.py`, `optimizer.py`); schedules that
depend on the course of the training, such as reducing the learning rate on a plateau.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from switokd.config.sections import Schedule


def learning_rate(schedule: Schedule, base: float, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a network at `step`; `base` is its optimizer's `lr`.

    Warm-up: step i of w uses i / w of the rate without warm-up. Multi-step: `base` times gamma for
    each milestone whose epoch is over. Cosine: half a period, from `base` at the first step after
    the warm-up to `min_lr` at the end of the last epoch (Loshchilov and Hutter, ICLR 2017,
    arXiv:1608.03983, without restarts).
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
    """Divides each epoch into windows of `size` steps; one window shares one optimizer step.

    The last window of an epoch, or of a run that ends within an epoch, may be shorter, so that no
    gradient is kept beyond an epoch.
    """

    size: int = 1
    steps_per_epoch: int = 1
    total_steps: int | None = None
    """Steps of the whole run; None: the run ends with an epoch."""

    def of(self, step: int) -> range:
        """Return the steps of the window that contains `step`."""
        if self.size == 1:
            return range(step, step + 1)
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        first = step - position % self.size
        end = min(first + self.size, (epoch + 1) * self.steps_per_epoch + 1)
        last_end = end if self.total_steps is None else self.total_steps + 1
        return range(first, min(end, last_end))
