"""The norm of a network's gradient, measured when someone asks for it.

Not covered: clipping (`optimizer.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GradientNorm:
    """The L2 norm over all parameters, in the first optimizer step after each `take`.

    The norm stays on the device until `take`, so that no step waits for it.
    """

    def __init__(self) -> None:
        self._norm: Tensor | None = None
        self._is_wanted = True

    def note(self, parameters: Sequence[nn.Parameter], norm: Tensor | None) -> None:
        """Measure the norm of an optimizer step if it is asked for.

        norm: if clipping has measured it; the gradients are clipped then.
        """
        if not self._is_wanted:
            return
        self._is_wanted = False
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._norm = norm.detach()

    def take(self) -> float | None:
        """Return what was measured since the last call, and ask for the next; waits for a GPU."""
        norm, self._norm, self._is_wanted = self._norm, None, True
        return None if norm is None else norm.item()
