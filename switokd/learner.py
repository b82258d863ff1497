"""One network on one rank, with all that its step needs: forward, backward, update.

Not covered: what it learns from (`strategies/`, `objective.py`); building it (`setup.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from switokd.gradients import Gradients
from switokd.stopwatch import Stopwatch
from switokd.topology import Role
from switokd.world import naming


@dataclass(frozen=True)
class Learner:
    """One network. A `frozen` one only ever answers, in evaluation mode."""

    name: str
    role: Role
    model: nn.Module
    network: Callable[[Tensor], Tensor]
    """The model as it is called: itself, or compiled."""
    optimizer: Optimizer
    gradients: Gradients
    frozen: bool = False
    bf16: bool = False
    learning: Stopwatch = field(default_factory=Stopwatch)
    """Time that backward and update take: what a pause saves."""

    @property
    def is_teacher(self) -> bool:
        """Whether the decision concerns it."""
        return self.role is Role.TEACHER

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[b, C]` of images `[b, ...]`, with their graph."""
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16)
        with autocast, torch.set_grad_enabled(not self.frozen):
            return _in_fp32(self.network(x))

    def predict(self, x: Tensor) -> Tensor:
        """The same for evaluation, which is too short to compile the model a second time for."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return _in_fp32(self.model(x))

    def backward(self, loss: Tensor | None) -> None:
        """Compute this rank's gradients, and start to add up those of the network's ranks.

        None stands for an empty shard, which adds nothing.
        """
        with self.learning:
            self.gradients.start()
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
            self.gradients.complete()

    def update(self) -> None:
        """Apply the gradients of all the network's ranks."""
        with self.learning:
            self.gradients.finish()
            self.optimizer.step()


def _in_fp32(z: Tensor) -> Tensor:
    """Logits as losses and distances take them; what is no tensor is refused later, in words."""
    return z.float() if isinstance(z, Tensor) else z


def average_statistics(learner: Learner, share: float, transport: torch.device | None) -> None:
    """Give all of a network's ranks the mean of their BatchNorm statistics, to evaluate alike.

    share: this rank's part of each batch, which weights its statistics.
    """
    group = learner.gradients.group
    kinds = (torch.nn.modules.batchnorm._BatchNorm,)
    norms = [module for module in learner.model.modules() if isinstance(module, kinds)]
    found = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    if group is None or not found:
        return
    flat = share * torch.cat([b.reshape(-1) for b in found])
    flat = flat if transport is None else flat.to(transport)
    with naming(f"averaging the BatchNorm statistics of {learner.name}"):
        dist.all_reduce(flat, group=group)
    for buffer, part in zip(found, torch.split(flat, [b.numel() for b in found]), strict=True):
        buffer.copy_(part.view(buffer.shape))
