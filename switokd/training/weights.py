"""Collecting the networks' weights on rank 0, to be saved."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from switokd.errors import NonFiniteError
from switokd.models.given_weights import is_mask
from switokd.models.own_state import state_to_save
from switokd.runtime.placement import Placement
from switokd.runtime.process_group import World
from switokd.training.learner import Learner


def gather_weights(
    learners: Sequence[Learner],
    placement: Placement,
    world: World,
    names: Collection[str] | None = None,
    averages: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return the networks' state dicts on rank 0, and nothing elsewhere; every rank must call this.

    Keys are NAME, and NAME.ema for moving averages. names: the networks to collect; None: all.
    averages: whether to collect the moving averages too.
    """
    states: dict[str, dict[str, Any]] = {}
    for learner in learners:
        is_first = world.rank == placement.ranks_of(learner.name)[0]
        if is_first and (names is None or learner.name in names):
            what = f"network {learner.name}"
            states[learner.name] = state_to_save(learner.model, what)
            if averages and learner.averaged is not None:
                states[f"{learner.name}.ema"] = state_to_save(learner.averaged, what)
    return {name: state for rank in world.gather(states) for name, state in rank.items()}


def check_finite(learners: Sequence[Learner], rank: int) -> None:
    """Raise NonFiniteError if weights or buffers are not finite after the last step.

    A step checks only logits, which show the weights of the step before. A buffer may be a mask, in
    which -inf is meant (`is_mask`).
    """
    for learner in learners:
        buffers = [buffer for buffer in learner.model.buffers() if not is_mask(buffer)]
        values = [*learner.model.parameters(), *buffers]
        if not all(value.isfinite().all() for value in values):
            raise NonFiniteError(
                f"network {learner.name} (rank {rank}) has weights that are not "
                "finite after its last step; they were not saved",
                every_rank=False,
            )
