"""Strategies by name: how the networks of a run teach each other.

    switokd      the paper's: a teacher too far ahead of its student pauses   (switching.py)
    threshold    its ablation, with a fixed threshold: strategy_kwargs {delta: 0.5}
    vanilla      each network alone                                           (peers.py)
    dml          deep mutual learning: all are peers
    kd           trained teachers, frozen: networks.NAME.weights
    kdcl-naive, kdcl-linear, kdcl-minlogit, kdcl-general                      (kdcl.py)
                 one teacher, combined from all networks
    package.module:callable    your own, see `Strategy` in base.py

Torch-free on import: the coordinator uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from switokd.distillation.strategies.base import Strategy
from switokd.distillation.strategies.kdcl import (
    General,
    Linear,
    MinLogit,
    Naive,
)
from switokd.distillation.strategies.peers import DML, KD, Vanilla
from switokd.distillation.strategies.switching import SwitOKD, Threshold
from switokd.errors import UsageError, nearest
from switokd.plugins import import_callable

__all__ = ["STRATEGIES", "Strategy", "make_strategy"]

STRATEGIES: Mapping[str, Callable[..., Strategy]] = {
    "switokd": SwitOKD,
    "vanilla": Vanilla,
    "dml": DML,
    "kd": KD,
    "threshold": Threshold,
    "kdcl-naive": Naive,
    "kdcl-linear": Linear,
    "kdcl-minlogit": MinLogit,
    "kdcl-general": General,
}


def make_strategy(
    name: str, kwargs: Mapping[str, Any] | None = None, allowed: Collection[str] | None = None
) -> Strategy:
    """Make the strategy `name`, or the one at an import string.

    allowed: import strings that may be imported; None for any. UsageError if there is no such
    strategy, or it cannot be made with these arguments.
    """
    if ":" in name and (allowed is None or name in allowed):
        factory: Callable[..., Any] = import_callable(name, "distillation.strategy")
    elif name in STRATEGIES:
        factory = STRATEGIES[name]
    else:
        raise UsageError(
            f"strategy {name!r} is not one of {', '.join(STRATEGIES)}, or package.module:callable"
            f"{nearest(name, STRATEGIES)}"
        )
    try:
        made = factory(**(kwargs or {}))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"strategy {name} cannot be made with strategy_kwargs {dict(kwargs or {})}: {error}"
        ) from error
    if not isinstance(made, Strategy):
        raise UsageError(
            f"strategy {name} must be a switokd.distillation.strategies.Strategy, "
            f"got {type(made).__name__}"
        )
    return made
