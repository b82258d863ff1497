"""PyTorch's optimizers, without the import of its compiler.

PyTorch decorates an optimizer's methods, so that Dynamo does not trace them. The decorators
import Dynamo, Inductor, SymPy and ONNX: seconds, and about 150 MiB in every rank. switokd compiles
networks (`compute.compile`), but no optimizer, so these classes call the undecorated functions.

Not covered: compiling an optimizer's step; other optimizers.
"""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch
from torch.optim import Optimizer


class _Eager(Optimizer):
    """Mixin for an optimizer class of PyTorch."""

    add_param_group = unwrap(Optimizer.add_param_group)
    state_dict = unwrap(Optimizer.state_dict)
    load_state_dict = unwrap(Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters from their gradients, as the optimizer class does."""
        return unwrap(super().step)(self, closure)


class EagerSGD(_Eager, torch.optim.SGD):
    """torch.optim.SGD with undecorated methods."""


class EagerAdam(_Eager, torch.optim.Adam):
    """torch.optim.Adam with undecorated methods."""


class EagerAdamW(_Eager, torch.optim.AdamW):
    """torch.optim.AdamW with undecorated methods."""
