"""The optimizers of a run file: SGD, Adam and AdamW of PyTorch.

Not covered: making them (`training/build.py`); learning-rate schedules (`Schedule`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from switokd.config.base import Fraction, NonNegative, Positive, Section


class SGD(Section):
    """Stochastic gradient descent with momentum (torch.optim.SGD)."""

    name: Literal["sgd"] = "sgd"
    """The optimizer: sgd, adam or adamw. The settings below are for sgd."""
    lr: Positive = 0.1
    """Learning rate at the start, before the schedule changes it."""
    momentum: Fraction = 0.9
    """Factor of the previous update in the next one; 0: no momentum."""
    weight_decay: NonNegative = 5e-4
    """L2 penalty: this factor times the weights is added to the gradient; 0: none."""
    nesterov: bool = False
    """Use Nesterov's momentum; needs a momentum above 0."""
    decay_norms_and_biases: bool = True
    """false: no weight decay of one-dimensional parameters, that is of norms and biases."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Adam(Section):
    """Adam (torch.optim.Adam; Kingma and Ba, ICLR 2015)."""

    name: Literal["adam"]
    """adam. The settings below are for adam."""
    lr: Positive = 1e-3
    """Learning rate at the start, before the schedule changes it."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay per update of the running means of the gradient and of its square."""
    weight_decay: NonNegative = 0.0
    """L2 penalty: this factor times the weights is added to the gradient; 0: none."""
    decay_norms_and_biases: bool = True
    """false: no weight decay of one-dimensional parameters, that is of norms and biases."""


class AdamW(Section):
    """Adam with decoupled weight decay (torch.optim.AdamW; Loshchilov and Hutter, ICLR 2019)."""

    name: Literal["adamw"]
    """adamw. The settings below are for adamw."""
    lr: Positive = 1e-3
    """Learning rate at the start, before the schedule changes it."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay per update of the running means of the gradient and of its square."""
    weight_decay: NonNegative = 0.01
    """Decoupled: an update subtracts learning rate times this factor times the weights."""
    decay_norms_and_biases: bool = True
    """false: no weight decay of one-dimensional parameters, that is of norms and biases."""


def optimizer_name(optimizer: Any) -> str:
    """Name of the optimizer that a section describes; sgd if the section has no name."""
    if isinstance(optimizer, dict):
        return str(optimizer.get("name", "sgd"))
    return str(getattr(optimizer, "name", "sgd"))
