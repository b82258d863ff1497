"""The optimizers of a run file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    model_validator,
)

from switokd.config.base import Fraction, NonNegative, Positive, Section


class SGD(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    """sgd, adam or adamw; the settings of sgd:"""
    lr: Positive = 0.1
    """Learning rate at the start."""
    momentum: Fraction = 0.9
    """Share of the previous update that is kept."""
    weight_decay: NonNegative = 5e-4
    """L2 penalty."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    decay_norms_and_biases: bool = True
    """false: no weight decay of one-dimensional parameters, which norms' and biases are."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov only with a momentum above 0")
        return self


class Adam(Section):
    """Adam."""

    name: Literal["adam"]
    """adam; its settings:"""
    lr: Positive = 1e-3
    """Learning rate at the start."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient."""
    weight_decay: NonNegative = 0.0
    """L2 penalty."""
    decay_norms_and_biases: bool = True
    """false: no weight decay of one-dimensional parameters, which norms' and biases are."""


class AdamW(Section):
    """Adam with weight decay apart from the gradient."""

    name: Literal["adamw"]
    """adamw; its settings:"""
    lr: Positive = 1e-3
    """Learning rate at the start."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient."""
    weight_decay: NonNegative = 0.01
    """Share of the weights taken off at each update, times the learning rate."""
    decay_norms_and_biases: bool = True
    """false: no weight decay of one-dimensional parameters, which norms' and biases are."""


def optimizer_name(optimizer: Any) -> str:
    """Which optimizer a section describes: SGD unless it says otherwise."""
    if isinstance(optimizer, dict):
        return str(optimizer.get("name", "sgd"))
    return str(getattr(optimizer, "name", "sgd"))
