"""The state of a run between two steps: captured from all ranks, and restored.

A checkpoint is taken after a step's optimizer steps and before the evaluation of an epoch that ends
there. It holds everything that the next step depends on; images, augmentation and dropout depend on
the seed and the step alone.

`torch.distributed.checkpoint` is not used: every rank would need the same disk, and its metadata is
a pickle, which can execute code when it is loaded.

Not covered: the files (`runs/checkpoints.py`); state of a user's data set; random numbers that a
user's code draws outside of a forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switokd.config.sections import Checkpoint
from switokd.coordination.commands import Commands
from switokd.distillation.overrides import Action, Stamped
from switokd.runtime.lifecycle import Preempted, Stopped
from switokd.runtime.placement import LocalPlacement, Placement
from switokd.training.exchange import Request
from switokd.training.learner import Learner

State = dict[str, Any]
"""Tensors, numbers, texts, lists and dicts; nothing that needs code to be loaded."""


class CheckpointClock:
    """Decides when a checkpoint is due; rank 0 measures the minutes for all ranks.

    stops: whether this rank was asked to end. commands: those of the run.
    """

    def __init__(
        self, settings: Checkpoint, rank: int, stops: Callable[[], bool], commands: Commands
    ) -> None:
        self._settings, self._stops, self._commands = settings, stops, commands
        self._stopped_by: Stamped | None = None
        minutes = settings.every_minutes if rank == 0 and settings.keep else None
        self._interval = float("inf") if minutes is None else 60 * minutes
        self._saved_at = time.monotonic()

    @property
    def request(self) -> Request:
        """What this rank asks of all ranks after the next step."""
        request = Request.COMMAND if self._commands.has_waiting else Request.NOTHING
        if self._stops():
            return request | Request.STOP
        is_due = time.monotonic() - self._saved_at >= self._interval
        return request | Request.CHECKPOINT if is_due else request

    def obey(self, step: int, request: Request) -> Request:
        """Take the commands that wait, all ranks together; return what the run does after `step`.

        request: that of all ranks.
        """
        for stamped in self._commands.take(step) if Request.COMMAND in request else ():
            if stamped.command.action is Action.CHECKPOINT:
                request |= Request.CHECKPOINT
            if stamped.command.action is Action.STOP:
                request |= Request.STOP
                self._stopped_by = stamped
        return request

    def end(self, step: int) -> Preempted:
        """Return what ends the run after `step`."""
        if self._stopped_by is None:
            return Preempted(f"stopped by SIGTERM after step {step}")
        asked_by = self._stopped_by.command.asked_by
        who = "an operator" if asked_by == "operator" else "somebody with the run's secret"
        return Stopped(f"stopped after step {step} by a command of {who}")

    def is_due(self, step: int, request: Request, is_last: bool) -> bool:
        """Return whether all ranks save after `step`; request: what the run does then."""
        if not self._settings.keep:
            return False
        steps = self._settings.every_steps
        is_asked = bool(request & (Request.CHECKPOINT | Request.STOP))
        return is_last or is_asked or (steps is not None and step % steps == 0)

    def saved(self) -> None:
        """Measure the minutes from now on."""
        self._saved_at = time.monotonic()


def capture(learners: Sequence[Learner], local_placement: LocalPlacement) -> State:
    """Return a copy of this rank's part of the state, on the CPU.

    Weights and the optimizer's state are equal on all ranks of a network, and its first rank
    returns them. Buffers and gradients that wait for their optimizer step differ by rank.
    """
    placement, rank = local_placement.placement, local_placement.rank
    shared, own = {}, {}
    for learner in learners:
        step = learner.optimizer_step
        if rank == placement.ranks_of(learner.name)[0]:
            shared[learner.name] = {"model": learner.model.state_dict(), **step.state_dict()}
        own[learner.name] = {
            "buffers": dict(learner.model.named_buffers()),
            "average_buffers": dict(learner.averaged.named_buffers()) if learner.averaged else {},
            "pending": step.pending,
            "seconds": learner.timer.seconds,
        }
    part: State = copied({"shared": shared, "own": own})
    return part


@dataclass(frozen=True)
class SavedState:
    """The state of a whole run after `step`, as rank 0 has read it."""

    step: int
    placement: Placement
    ranks: Sequence[State]
    """What `capture` returned on each rank, with `epoch` and `waiting` of the trainer."""
    run: State
    """What only rank 0 knows: the strategy's state, the best accuracies, the recorder's sums."""

    @classmethod
    def of(cls, state: State) -> SavedState:
        """Return what `state_dict` was made of."""
        table = tuple(
            (name, tuple((rank, weight) for rank, weight in row))
            for name, row in state["placement"]
        )
        placement = Placement(table, state.get("micro_batches", 1))
        return cls(state["step"], placement, state["ranks"], state["run"])

    def state_dict(self) -> State:
        """Return the whole state, to be saved."""
        table = [[name, [list(cell) for cell in row]] for name, row in self.placement.table]
        return {
            "step": self.step,
            "placement": table,
            "micro_batches": self.placement.micro_batches,
            "ranks": self.ranks,
            "run": self.run,
        }

    def for_rank(self, rank: int, placement: Placement) -> State:
        """Return what a rank restores.

        If the placement has changed, buffers are averaged over the ranks as for an evaluation, and
        sums go to the first rank of each network. With micro-batches, buffers and gradients are
        equal on all ranks of a network, and stay as they are.
        """
        names = placement.networks_of(rank)
        shared = {name: s for part in self.ranks for name, s in part["shared"].items()}
        part: State = {"step": self.step, "run": self.run, "waiting": None}
        part["shared"] = {name: shared[name] for name in names}
        if placement == self.placement:
            return {**part, **{key: self.ranks[rank][key] for key in ("own", "epoch", "waiting")}}
        part["own"] = {name: self._merged(name, rank, placement) for name in names}
        part["epoch"] = self._merged_epoch(rank, placement)
        return part

    def _merged(self, name: str, rank: int, placement: Placement) -> State:
        weights = dict(dict(self.placement.table)[name])
        parts = [
            (w / sum(weights.values()), self.ranks[r]["own"][name]) for r, w in weights.items()
        ]
        merged: State = {
            key: {
                buffer: _mean([(share, part[key][buffer]) for share, part in parts])
                for buffer in parts[0][1][key]
            }
            for key in ("buffers", "average_buffers")
        }
        is_first = rank == placement.ranks_of(name)[0]
        pending = [part["pending"] for _, part in parts if part["pending"] is not None]
        merged["pending"] = _sums(pending) if pending and is_first else None
        if pending and not is_first:
            merged["pending"] = [None] * len(pending[0])
        if self.placement.micro_batches > 1:
            merged |= {key: parts[0][1][key] for key in ("buffers", "average_buffers", "pending")}
        merged["seconds"] = max(part["seconds"] for _, part in parts) if is_first else 0.0
        return merged

    def _merged_epoch(self, rank: int, placement: Placement) -> State:
        networks: State = {}
        for name in placement.networks_of(rank):
            parts = [
                self.ranks[r]["epoch"]["networks"][name] for r in self.placement.ranks_of(name)
            ]
            sums = [sum(values) for values in zip(*(part["sums"] for part in parts), strict=True)]
            is_first = rank == placement.ranks_of(name)[0]
            networks[name] = {
                "sums": sums if is_first else [0.0, 0.0, 0, 0],
                "paused": parts[0]["paused"],
                "learning_seconds": max(part["learning_seconds"] for part in parts),
            }
        epochs = [part["epoch"] for part in self.ranks]
        return {
            "steps": epochs[0]["steps"],
            "seconds": max(epoch["seconds"] for epoch in epochs),
            "networks": networks,
        }


def restore(learners: Sequence[Learner], part: State) -> None:
    """Restore this rank's part of the state in place: CUDA graphs hold the tensors' addresses."""
    for learner in learners:
        shared, own = part["shared"][learner.name], part["own"][learner.name]
        learner.model.load_state_dict(shared["model"])
        learner.optimizer_step.load_state_dict(shared)
        _restore_buffers(learner.model, own["buffers"])
        if learner.averaged is not None:
            _restore_buffers(learner.averaged, own["average_buffers"])
        if own["pending"] is not None:
            learner.optimizer_step.restore_pending(own["pending"])
        learner.timer.restart(own["seconds"])


@torch.no_grad()
def _restore_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Copy buffers in place, also those that are not in the model's state dict."""
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def copied(value: Any) -> Any:
    """Return a copy with all tensors on the CPU, in their memory order."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = map(copied, value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _mean(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return the weighted mean of buffers; a buffer of integers is that of the first rank."""
    if not parts[0][1].is_floating_point():
        return parts[0][1]
    return torch.stack([share * buffer for share, buffer in parts]).sum(dim=0)


def _sums(gradients: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Add several ranks' gradients, parameter by parameter."""
    sums: list[Tensor | None] = []
    for column in zip(*gradients, strict=True):
        present = [gradient for gradient in column if gradient is not None]
        sums.append(torch.stack(present).sum(dim=0) if present else None)
    return sums
