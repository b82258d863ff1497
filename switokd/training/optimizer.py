"""One network's optimizer step: loss scaling, accumulation, clipping, the moving average.

All ranks of a network make the same step, because each rank uses the gradients' sum over all of
them.

Not covered: this sum (`reducer.py`); the learning rate (`schedules.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switokd.errors import NonFiniteError
from switokd.training.ema import MovingAverage
from switokd.training.gradient_norm import GradientNorm
from switokd.training.reducer import GradientReducer
from switokd.training.schedules import AccumulationWindow

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtype of forward passes by compute.precision, where it is not float32."""


class OptimizerStep:
    """Applies one network's gradients to its weights.

    A step uses the mean of the gradients of an accumulation window. A training step in which the
    network was paused counts in this mean, with a gradient of zero. If the network was paused in
    the whole window, there is no optimizer step: weights, momentum and average stay unchanged.

    clip_norm: maximum L2 norm of the mean gradient over all parameters; None: no limit. scaler:
    scales losses so that small gradients do not vanish in float16; None: no scaling. average:
    moving average of weights and BatchNorm statistics; None: no average.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        reducer: GradientReducer,
        window: AccumulationWindow | None = None,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        self.optimizer, self.reducer = optimizer, reducer
        self.scaler, self.average = scaler, average
        self._window, self._clip_norm = window or AccumulationWindow(), clip_norm
        self.norm = GradientNorm()
        """Of the mean gradient, before it is clipped."""
        self._checks_gradients = True
        self._has_gradients = False
        """Whether gradients wait for the end of their window."""
        self._is_added_up = False
        """Whether the gradients are already sums over the network's ranks."""

    def apply_unchecked(self) -> None:
        """Apply gradients that are not finite as well: the caller looks at them afterwards."""
        self._checks_gradients = False

    def begin(self, step: int) -> None:
        """Prepare for the backward pass of `step`; only a window's last step sends gradients."""
        if not self._has_gradients:
            self.reducer.start()
        self._has_gradients = True
        self.reducer.set_sync(self._is_last(step))
        self.reducer.begin()

    def scale(self, loss: Tensor, step: int) -> Tensor:
        """Return the loss divided by the window's size and multiplied by the scaler's scale."""
        size = len(self._window.of(step))
        loss = loss / size if size > 1 else loss
        return loss if self.scaler is None else self.scaler.scale(loss)

    def is_due(self, step: int) -> bool:
        """Return whether `step` ends a window in which the network was not always paused."""
        return self._has_gradients and self._is_last(step)

    @property
    def gradients(self) -> list[Tensor]:
        """This rank's gradients that wait for the optimizer step; empty if none wait."""
        if not self._has_gradients:
            return []
        return [p.grad for p in self.reducer.parameters if p.grad is not None]

    def add_up(self) -> None:
        """Wait until the gradients are sums over the network's ranks; `apply` does it otherwise."""
        if self._is_added_up:
            return
        self.reducer.set_sync(True)
        self.reducer.complete()  # if the network was paused in the window's last step
        self.reducer.finish()
        self._is_added_up = True

    def drop(self) -> None:
        """Drop the gradients of this window; all ranks of the network do it after the same step."""
        self._has_gradients = self._is_added_up = False
        self.reducer.start()

    def apply(self, model: nn.Module, name: str = "", step: int = 0) -> None:
        """Apply the gradients of all ranks to the weights, and the weights to the average.

        name, step: name the network and the step in an error. NonFiniteError if a gradient is not
        finite, before any weight has changed; on a GPU, where this would wait for the device, and
        with a loss scaler, which skips the step, gradients are not checked.
        """
        self.add_up()
        self._has_gradients = self._is_added_up = False
        if self.scaler is None and self._checks_gradients:
            check_gradients(self.reducer.parameters, name, step)
        if not self.optimizer.state:
            _init_momentum(self.optimizer)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = None
        if self._clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.reducer.parameters, self._clip_norm)
        self.norm.note(self.reducer.parameters, norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)  # skips gradients that overflowed
            self.scaler.update()
        if self.average is not None:
            self.average.update(model)

    def state_dict(self) -> dict[str, Any]:
        """Return what is equal on all ranks of the network; tensors are not copied."""
        average = self.average
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "average": None if average is None else average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    @property
    def pending(self) -> list[Tensor | None] | None:
        """This rank's gradients that wait for the end of their window; None if none wait."""
        return [p.grad for p in self.reducer.parameters] if self._has_gradients else None

    def restore_pending(self, gradients: Sequence[Tensor | None]) -> None:
        """Restore gradients that wait for the end of their window."""
        self.reducer.start()
        self._has_gradients = True
        for parameter, gradient in zip(self.reducer.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)

    def _is_last(self, step: int) -> bool:
        return step == self._window.of(step)[-1]


def check_gradients(parameters: Sequence[nn.Parameter], name: str, step: int) -> None:
    """NonFiniteError if a gradient on the CPU is NaN or infinite."""
    if not are_finite([p.grad for p in parameters if p.grad is not None and not p.grad.is_cuda]):
        raise NonFiniteError(
            f"network {name} has a gradient that is not finite at step {step}; it was not applied. "
            f"The usual remedy is a lower networks.{name}.optimizer.lr, or "
            f"networks.{name}.clip_norm",
            every_rank=False,
        )


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no value is NaN or infinite; integers are finite. Waits for a GPU."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not floats:
        return True
    # The sum is not finite if a term is not; a sum of finite terms that overflows is looked at.
    total = torch.stack([tensor.sum() for tensor in floats]).sum()
    return bool(total.isfinite()) or all(bool(tensor.isfinite().all()) for tensor in floats)


def _init_momentum(optimizer: Optimizer) -> None:
    """Set SGD's momentum to zeros before the first step; Adam needs no preparation.

    Otherwise PyTorch creates the momentum in the first step. Its fused SGD then

    * leaves uninitialised memory in the momentum if the first gradients overflowed;
    * fails later if a parameter's first gradient comes after other parameters' first gradients.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in (p for p in group["params"] if p.requires_grad):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def loss_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Return a loss scaler whose scale is set, also on a rank that has not computed a loss yet."""
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.zeros((), device=device))  # the first call creates the scale
    return scaler


def parameter_groups(
    model: nn.Module, decay_norms_and_biases: bool
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Return a model's parameters for its optimizer.

    decay_norms_and_biases: whether weight decay applies to norms and biases too. If not, parameters
    with one dimension form a group of their own without weight decay.
    """
    parameters = list(model.parameters())
    if decay_norms_and_biases:
        return parameters
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
