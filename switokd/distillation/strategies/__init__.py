"""Strategies by name: who learns from whom, and when a teacher pauses.

    switokd      the paper's method: a teacher too far ahead of its student pauses  (switching.py)
    threshold    the paper's ablation: fixed threshold, strategy_kwargs {delta: 0.5}
    vanilla      every network alone, cross-entropy only                            (peers.py)
    dml          deep mutual learning: every network learns from all others
    kd           frozen, trained teachers, from networks.NAME.weights
    kdcl-naive, kdcl-linear, kdcl-minlogit, kdcl-general                            (kdcl.py)
                 all networks learn from one teacher that is combined from their logits
    package.module:callable    your own strategy, see `Strategy` in base.py

Importing this package does not import PyTorch, because the coordinator uses it.

Not covered: the form of the KL terms (`losses.py`).
"""

from __future__ import annotations

import copy
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
from switokd.errors import UsageError, nearest, own_code_error
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
    """Create a strategy by its name or import string.

    kwargs: the constructor's arguments. allowed: import strings that may be imported; None allows
    all. UsageError if the strategy does not exist or refuses the arguments.
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
        strategy = factory(**copy.deepcopy(dict(kwargs or {})))  # which it may change and keep
    except BaseException as error:
        what = f"strategy {name} cannot be created with strategy_kwargs {dict(kwargs or {})}"
        if found := own_code_error(error, what, every_rank=True):
            raise found from error
        if not isinstance(error, TypeError | ValueError):
            raise
        raise UsageError(f"{what}: {error}") from error
    if not isinstance(strategy, Strategy):
        raise UsageError(
            f"strategy {name} must be a switokd.distillation.strategies.Strategy, "
            f"got {type(strategy).__name__}"
        )
    return strategy
