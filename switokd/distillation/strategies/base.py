"""Base class of all strategies: when a teacher pauses, and from whom each network learns.

Workers and coordinator use the same class. The coordinator has no PyTorch, so a strategy must
import torch inside its methods, not at the top of its module.

Not covered: the form of the KL terms (`losses.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from switokd.distillation.couplings import Couplings, Term
from switokd.distillation.decision import Decision, Mode
from switokd.distillation.gap import Distances
from switokd.distillation.topology import Role

if TYPE_CHECKING:
    from torch import Tensor


class Strategy:
    """Base class: no teacher pauses, and no network learns from another one.

    To write a strategy, inherit and override what differs. The constructor receives
    `distillation.strategy_kwargs`.
    """

    pauses: bool = False
    """Whether teachers may be in expert mode."""
    frozen_teachers: bool = False
    """Whether teachers never train: evaluation mode, weights from `networks.NAME.weights`."""
    fixed_delta: float | None = None
    """Threshold that replaces the paper's adaptive threshold; None keeps the adaptive one."""
    held_out: int = 0
    """Number of training images to hold out of training, for `observe`."""

    def switch(self, d: Distances, delta: float) -> Mode:
        """Mode of a pair with distances `d` and threshold `delta`.

        Must be a pure function and monotonic in each argument: ranks use it to decide a step
        before the coordinator's decision arrives.
        """
        return Mode.LEARNING

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> list[Term]:
        """KL terms of a network's loss.

        decision: the decision of this step; None for a student, which does not wait for it.
        """
        return []

    def combine(self, logits: Mapping[str, Tensor], y: Tensor) -> Mapping[str, Tensor]:
        """Logits `[B, C]` of additional peers, by name, combined from all networks' logits.

        logits: detached, `[B, C]` by network. y: labels `[B]` or target distributions `[B, C]`.
        Every rank calls this once per step with the same arguments and must get the same result.
        """
        return {}

    def observe(self, logits: Mapping[str, Tensor], y: Tensor) -> None:
        """Receive all networks' logits of the held-out images, before each epoch.

        logits: `[N, C]` by network, for N held-out images. y: labels `[N]` or targets `[N, C]`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that an interrupted run continues with the same results.

        Tensors, numbers, texts, lists and dicts. Override it, and `load_state_dict`, if the
        strategy changes from step to step.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def all_peers(network: str, couplings: Couplings) -> list[str]:
    """Names of all peers of a network, in the topology's order."""
    peers = {peer for role in Role for peer in couplings.peers(network, role)}
    return [name for name in couplings.topology if name in peers]
