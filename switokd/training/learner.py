"""One network on one rank, with all that its step needs: forward, backward, update.

Not covered: what it learns from (`strategies/`, `losses.py`); building it (`build.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switokd.data.augment import mix_one, seed_torch
from switokd.distillation.couplings import Term
from switokd.distillation.losses import objective
from switokd.distillation.topology import Role
from switokd.training.cuda_graphs import GraphedFunctions, GraphedModel
from switokd.training.optimizer import OptimizerStep
from switokd.training.reducer import GradientReducer
from switokd.training.timer import Timer


@dataclass(frozen=True)
class Learner:
    """One network. A `frozen` one only ever answers, in evaluation mode."""

    name: str
    role: Role
    model: nn.Module
    network: Callable[[Tensor], Tensor]
    """The model as it is called: itself, or compiled."""
    optimizer: Optimizer
    gradients: GradientReducer
    frozen: bool = False
    key: int = 0
    """What it draws from, given by the run's seed and its name."""
    low: torch.dtype | None = None
    """What its forward pass computes in; None: float32."""
    is_graphed: bool = False
    """Whether it is to be launched as CUDA graphs."""
    graphed_models: dict[int, GraphedModel] = field(default_factory=dict)
    """What computes batches of so many images by a CUDA graph."""
    graphed_functions: GraphedFunctions = field(default_factory=GraphedFunctions)
    """What records its losses, if they shall be."""
    updates: OptimizerStep = field(default_factory=OptimizerStep)
    learning: Timer = field(default_factory=Timer)
    """Time that backward and update take: what a pause saves."""

    def eager(self) -> Learner:
        """The same one, but that nothing is recorded."""
        return replace(
            self, is_graphed=False, graphed_models={}, graphed_functions=GraphedFunctions()
        )

    @property
    def is_teacher(self) -> bool:
        """Whether the decision concerns it."""
        return self.role is Role.TEACHER

    @property
    def averaged(self) -> nn.Module | None:
        """The moving average of the model, if it is kept."""
        average = self.updates.average
        return None if average is None else average.module

    def forward(self, x: Tensor, step: int = 0, begin: int = 0) -> Tensor:
        """Logits `[b, C]` of images `[b, ...]`, with their graph.

        What the network draws from PyTorch's generators (dropout) depends on `key`, the step, and
        where in its batch x begins, not on what else was computed in this process.
        """
        seed_torch(mix_one(self.key, step, begin), x.device)
        return self.graphed_models.get(len(x), self.compute)(x)

    def compute(self, x: Tensor) -> Tensor:
        """The same, kernel by kernel, from whatever was drawn before."""
        with autocast(x.device, self.low), torch.set_grad_enabled(not self.frozen):
            return _in_fp32(self.network(x))

    def predict(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """The same for evaluation, which is too short to compile the model a second time for.

        model: another than the live one, such as its moving average.
        """
        with autocast(x.device, self.low):
            return _in_fp32((model or self.model)(x))

    def loss(
        self, z: Tensor, y: Tensor, logits: Mapping[str, Tensor], terms: Iterable[Term]
    ) -> Tensor:
        """See `objective`."""
        # What a strategy gives may come one by one, with tensors for numbers.
        terms = [Term(each.peer, float(each.weight), float(each.tau)) for each in terms]
        peers = {term.peer: logits[term.peer] for term in terms}

        def run(z: Tensor, y: Tensor, *z_peers: Tensor) -> Tensor:
            return objective(z, y, dict(zip(peers, z_peers, strict=True)), terms)

        return self.graphed_functions.differentiable(tuple(terms), run, z, y, *peers.values())

    def backward(self, loss: Tensor | None, step: int) -> None:
        """Compute this rank's gradients, and start to add up those of the network's ranks.

        None stands for an empty shard, which adds nothing. Where several steps share an update,
        the gradients wait on this rank for the last of these steps.
        """
        with self.learning:
            self.updates.begin(self.gradients, step)
            if loss is not None:
                self.updates.scaled(loss, step).backward()  # type: ignore[no-untyped-call]
            self.gradients.complete()

    def update(self, step: int) -> None:
        """Apply the gradients of all the network's ranks, if `step` is the last to share them.

        To be called after every step, also one in which the network was paused.
        """
        if self.updates.are_due(step):
            with self.learning:
                self.updates.apply(self.gradients, self.optimizer, self.model)


def autocast(device: torch.device, low: torch.dtype | None) -> torch.autocast:
    """A context whose matrix products and convolutions are in `low`; None: as they come."""
    return torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None)


def _in_fp32(z: Tensor) -> Tensor:
    """Logits as losses and distances take them; what is no tensor is refused later, in words."""
    return z.float() if isinstance(z, Tensor) else z
