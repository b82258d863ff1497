"""Gives each network its own images, which it may change in place.

Networks on one rank compute on the same batch. A network that changes its input (`x.mul_(0.5)`)
would change the images of the others, and what their backward passes need. Therefore each network
gets a lazy copy: memory is copied when somebody writes to it, and only then. PyTorch sees every
write, also through views, `x.data` and `x.numpy()`.

Not covered: `x.resize_` to more elements, which PyTorch refuses for a lazy copy; an exported
network outside of switokd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from switokd.runtime.environment import describe_rank
from switokd.runtime.lifecycle import print_warning

T = TypeVar("T")


def lazy_copy(x: Tensor) -> Tensor:
    """Return a copy of `x` whose memory is copied before the first write to it or to `x`.

    Memory that PyTorch has not allocated itself, such as a numpy array's, is copied at once.
    """
    try:
        return torch._lazy_clone(x)
    except RuntimeError:
        return x.clone()


@dataclass
class InputGuard:
    """Calls one network with images of its own. warns: whether this rank may name the network."""

    network: str = ""
    warns: bool = True
    _has_warned: bool = field(default=False, init=False)

    def __call__(self, compute: Callable[[Tensor], T], x: Tensor) -> T:
        """Return `compute` of images that are equal to `x`; `x` stays as it is.

        Warns the first time that `compute` changes its input. Writes through `x.data` or numpy
        leave no trace for the warning, but they are copied as well.
        """
        own = lazy_copy(x)
        before = own._version
        result = compute(own)
        if own._version != before and not self._has_warned:
            self._has_warned = True
            if self.warns:
                print_warning(
                    f"network {self.network} changes its input in place; it gets a copy in every "
                    "step, and other networks keep their images. x = x * 2 instead of x.mul_(2) "
                    "needs no copy",
                    describe_rank(),
                )
        return result
