"""The exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from switokd.errors import UsageError, first_line
from switokd.models.own_state import copy_extra_states, modules_with_extra_state


class MovingAverage:
    """A copy of a model: average = decay * average + (1 - decay) * model, at each optimizer step.

    BatchNorm's running statistics are averaged like the weights, so that both fit together.
    Integer buffers and extra states are copied. The first update copies everything.

    PyTorch's AveragedModel is not used: its update counter lies on the CPU, and copying the counter
    to the GPU in every step waits for all work that is queued there.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self._mix = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._is_new = True
        self._with_extra_state = modules_with_extra_state(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`, after an optimizer step of `model`."""
        averages: list[Tensor] = []
        values: list[Tensor] = []
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        for average, value in zip(ours, theirs, strict=True):
            if self._is_new or not (average.is_floating_point() or average.is_complex()):
                average.copy_(value)
            else:
                averages.append(average)
                values.append(value)
        if averages:
            self._mix(averages, values, None)
        copy_extra_states(model, self.module, self._with_extra_state)
        self._is_new = False

    def state_dict(self) -> dict[str, Any]:
        """Return the average and whether it is new; tensors are not copied."""
        return {"module": self.module.state_dict(), "is_new": self._is_new}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self._is_new = state["is_new"]


def moving_average(name: str, model: nn.Module, decay: float) -> MovingAverage:
    """Return the moving average of network `name`; UsageError if the model cannot be copied."""
    try:
        return MovingAverage(model, decay)
    except Exception as error:
        raise UsageError(
            f"schedule.ema_decay: the average starts as a copy of {name}, which cannot be copied: "
            f"{first_line(error)}; leave ema_decay out, or fix the model's __deepcopy__",
            every_rank=False,
        ) from error
