"""What a strategy is: when a teacher pauses, and what each network learns from.

The coordinator and the workers use the same object, and the coordinator has no torch: a strategy
that computes on tensors imports torch where it does.

Not covered: the terms' form, which is KL (`losses.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from switokd.distillation.couplings import Couplings, Term
from switokd.distillation.decision import Decision, Mode
from switokd.distillation.gap import Distances
from switokd.distillation.topology import Role

if TYPE_CHECKING:
    from torch import Tensor


class Strategy:
    """Base of all strategies: nobody pauses, and nobody learns from another.

    To write one, inherit and replace what differs; `distillation.strategy_kwargs` are the
    constructor's arguments.
    """

    pauses: bool = False
    """Whether a teacher may be in expert mode."""
    frozen_teachers: bool = False
    """Whether teachers are left as they come, in evaluation mode, from `networks.NAME.weights`."""
    fixed_delta: float | None = None
    """A threshold to switch on in place of the paper's adaptive one."""
    held_out: int = 0
    """Training images that nobody trains on, for `observe`; 0 for none."""

    def switch(self, d: Distances, delta: float) -> Mode:
        """Mode of a pair with these distances. delta: its threshold.

        A pure function of its arguments, and monotonous in each: ranks decide by it beforehand.
        """
        return Mode.LEARNING

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> list[Term]:
        """The KL terms of a network's loss.

        `decision` is this step's; a student is given None, because it does not wait for one.
        """
        return []

    def combine(self, logits: Mapping[str, Tensor], y: Tensor) -> Mapping[str, Tensor]:
        """Further peers, made of all networks' logits: by name, `[B, C]`.

        logits: detached, `[B, C]` by network. y: labels `[B]` or target distributions `[B, C]`.
        Called once a step on every rank with the same numbers, and must give the same everywhere.
        """
        return {}

    def observe(self, logits: Mapping[str, Tensor], y: Tensor) -> None:
        """Take all networks' logits of the images held out; called before each epoch."""


def all_peers(network: str, couplings: Couplings) -> list[str]:
    """All peers of a network, in the topology's order."""
    peers = {p for role in Role for p in couplings.peers(network, role)}
    return [name for name in couplings.topology if name in peers]
