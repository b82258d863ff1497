"""From gradients to an update: loss scaling, accumulation over steps, clipping, the moving average.

One network's, on one rank; all its ranks come to the same, because each looks at the gradients'
sum over all of them.

Not covered: that sum (`reducer.py`); the learning rate (`schedules.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switokd.training.ema import MovingAverage
from switokd.training.reducer import GradientReducer
from switokd.training.schedules import AccumulationWindow

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By compute.precision: what forward passes compute in, where that is not float32."""


@dataclass
class OptimizerStep:
    """When and how one network's gradients change its weights.

    An update takes the mean of the gradients of a window of steps. A step in which the network
    was paused adds nothing to it, and counts all the same; a network that was paused in all of a
    window's steps is not updated at all: its weights, momentum and average stay as they are.
    """

    windows: AccumulationWindow = field(default_factory=AccumulationWindow)
    clip_norm: float | None = None
    """Largest L2 norm of the mean gradient over all parameters; None: no limit."""
    scaler: torch.amp.GradScaler | None = None
    """Keeps small gradients above zero in float16; None: they need no help."""
    average: MovingAverage | None = None
    """Exponential moving average of weights and BatchNorm statistics; None: not kept."""
    is_pending: bool = False
    """Whether gradients wait for their window's end."""

    def scaled(self, loss: Tensor, step: int) -> Tensor:
        """One step's loss as its window's mean and the scaler take it."""
        size = len(self.windows.of(step))
        loss = loss / size if size > 1 else loss
        return loss if self.scaler is None else self.scaler.scale(loss)

    def begin(self, gradients: GradientReducer, step: int) -> None:
        """Make ready for the gradients of `step`; they travel with the window's last ones."""
        if not self.is_pending:
            gradients.start()
        self.is_pending = True
        gradients.holds = not self._ends(step)

    def are_due(self, step: int) -> bool:
        """Whether `step` ends a window in which there was something to learn from."""
        return self.is_pending and self._ends(step)

    def apply(self, gradients: GradientReducer, optimizer: Optimizer, model: nn.Module) -> None:
        """Update the model by what its ranks have gathered in this window."""
        self.is_pending = gradients.holds = False
        gradients.complete()  # where the network was paused in the window's last step
        gradients.finish()
        if not optimizer.state:
            _momentum_from_zeros(optimizer)
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(gradients.parameters, self.clip_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)  # skips gradients that have overflowed
            self.scaler.update()
        if self.average is not None:
            self.average.follow(model)

    def _ends(self, step: int) -> bool:
        return step == self.windows.of(step)[-1]


def _momentum_from_zeros(optimizer: Optimizer) -> None:
    """Give SGD its momentum before the first update; Adam needs nothing.

    PyTorch would make it in the first one. Its fused form would then

    * leave whatever was in that memory before, if gradients have overflowed;
    * fail later on, if a parameter's first gradient comes after other parameters' first ones.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in (p for p in group["params"] if p.requires_grad):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def loss_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Give a loss scaler that has its scale, also on a rank that has yet to see a loss."""
    made = torch.amp.GradScaler(device.type)
    made.scale(torch.zeros((), device=device))  # else it has none before its first loss
    return made


def parameter_groups(
    model: nn.Module, decay_norms_and_biases: bool
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """A model's parameters for its optimizer: all alike, or without weight decay of some.

    Norms' scales and shifts and all biases are told by their one dimension.
    """
    parameters = list(model.parameters())
    if decay_norms_and_biases:
        return parameters
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
