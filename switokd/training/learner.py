"""One network on one rank: its forward pass, loss, backward pass and optimizer step.

Not covered: the terms of the loss (`strategies/`, `losses.py`); building a learner (`build.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switokd.data.augment import mix_one, seed_generators, seed_torch
from switokd.distillation.couplings import Term
from switokd.distillation.losses import objective
from switokd.distillation.topology import Role
from switokd.errors import UsageError, own_code_error
from switokd.training.cuda_graphs import NetworkGraphs
from switokd.training.input_guard import InputGuard
from switokd.training.micro_batches import MeanBuffers, split
from switokd.training.optimizer import OptimizerStep
from switokd.training.timer import Timer

EVALUATION, BACKWARD = -1, 1
"""Mark the random numbers that a network draws outside of its forward pass in training."""


@dataclass(frozen=True)
class ForwardPass:
    """How a network computes logits in training."""

    module: Callable[[Tensor], Tensor]
    """The model itself, or its compiled form."""
    autocast_dtype: torch.dtype | None = None
    """Dtype of matrix products and convolutions; None: float32."""
    frozen: bool = False
    """True if the network never learns. It is then in evaluation mode, with no autograd graph."""
    seed: int = 0
    """Seed of the network's random numbers (dropout), from the run's seed and its name."""
    guard: InputGuard = field(default_factory=InputGuard)
    """Gives the network its own images: others on this rank get the same batch."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32 logits `[b, C]` of images `[b, ...]`; does not seed the generators."""
        with torch.set_grad_enabled(not self.frozen):
            return self.call(self.module, x)

    def call(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return float32 logits of `module`, computed under autocast."""
        dtype = self.autocast_dtype
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            z = module(x)
        # The exchange refuses anything else with a clear message.
        return z.float() if isinstance(z, Tensor) and z.is_floating_point() else z


Method = TypeVar("Method", bound=Callable[..., Any])


def _with_own_code_errors(method: Method) -> Method:
    """Make a method of a learner raise OwnCodeError for an error of the user's network.

    For a network that is not switokd's, these are also errors that PyTorch raises in here.
    """

    @wraps(method)
    def run(learner: Learner, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(learner, *args, **kwargs)
        except BaseException as error:
            is_switokds = type(learner.model).__module__.startswith("switokd.")
            door = "" if is_switokds else __file__
            found = own_code_error(error, f"network {learner.name}", door)
            if found is None:
                raise
            raise found from error

    return cast("Method", run)


@dataclass(frozen=True)
class Learner:
    """One network on one rank."""

    name: str
    role: Role
    model: nn.Module
    forward_pass: ForwardPass
    optimizer_step: OptimizerStep
    graphs: NetworkGraphs = field(default_factory=NetworkGraphs)
    timer: Timer = field(default_factory=Timer)
    """Measures backward passes and optimizer steps: the time that a pause saves."""
    buffers: MeanBuffers | None = None
    """The buffers of a network whose batch is computed in micro-batches; None: all at once."""

    @property
    def is_teacher(self) -> bool:
        """Whether decisions can pause the network."""
        return self.role is Role.TEACHER

    @property
    def frozen(self) -> bool:
        """Whether the network never learns."""
        return self.forward_pass.frozen

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the network's weights."""
        return self.optimizer_step.optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return self.optimizer_step.reducer.parameters

    @property
    def averaged(self) -> nn.Module | None:
        """The model with averaged weights; None if no moving average is kept."""
        average = self.optimizer_step.average
        return None if average is None else average.module

    def eager(self) -> Learner:
        """Return the same learner without CUDA graphs."""
        return replace(self, graphs=NetworkGraphs())

    @_with_own_code_errors
    def forward(self, x: Tensor, step: int = 0, begin: int = 0) -> Tensor:
        """Return logits `[b, C]` of images `[b, ...]`, with an autograd graph.

        begin: index of x's first sample in the batch. The network's random numbers depend only on
        its seed, the step and `begin`, not on other computations in this process. It may change its
        input in place: `x` stays as it is.
        """
        key, graph = mix_one(self.forward_pass.seed, step, begin), self.graphs.model(len(x))
        if graph is not None:  # runs no Python, and copies the images into its own memory
            seed_torch(key, x.device)
            return graph(x)
        seed_generators(key, x.device)
        return self.forward_pass.guard(self.forward_pass, x)

    def forward_parts(
        self, x: Tensor, step: int, parts: Sequence[slice], n: int
    ) -> list[Tensor | None]:
        """Return the logits of this rank's micro-batches; None for an empty one.

        x: images of all of them. parts: where they lie in the batch of `n` samples.
        """
        if self.buffers is None:
            (part,) = parts
            return [self.forward(x, step, part.start) if part.stop > part.start else None]
        z: list[Tensor | None] = []
        self.buffers.begin()
        for part, images in zip(parts, split(x, parts), strict=True):
            with self.buffers.copied(len(images) / n, is_first=part.start == 0):
                z.append(self.forward(images, step, part.start) if len(images) else None)
        return z

    def predict_parts(self, x: Tensor, parts: Sequence[slice]) -> Tensor:
        """Return logits `[b, C]` for evaluation, computed by micro-batches as in training.

        `x` stays as it is, also if the network changes its input.
        """

        def predict(part: slice, images: Tensor) -> Tensor:
            evaluate = partial(self.predict, number=part.start)
            return self.forward_pass.guard(evaluate, images)

        if self.buffers is None:
            return predict(parts[0], x)
        images = zip(parts, split(x, parts), strict=True)
        return torch.cat([predict(part, x_part) for part, x_part in images if len(x_part)])

    @_with_own_code_errors
    def predict(self, x: Tensor, model: nn.Module | None = None, number: int = 0) -> Tensor:
        """Return logits `[b, C]` for evaluation, without compiled code or CUDA graphs.

        Compiling the model for the test's batch size would take longer than it saves. The network
        may change `x`.

        model: the model to use instead of the trained one, for example its moving average.
        number: of the batch; random numbers depend only on the network's seed and on it.
        """
        seed_generators(mix_one(self.forward_pass.seed, EVALUATION, number), x.device)
        return self.forward_pass.call(model or self.model, x)

    def loss(
        self, z: Tensor, y: Tensor, logits: Mapping[str, Tensor], terms: Iterable[Term]
    ) -> Tensor:
        """Return the scalar loss of this network's logits z; see `losses.objective`.

        UsageError if z depends on no parameter.
        """
        if not z.requires_grad:
            raise UsageError(
                f"networks.{self.name}: its logits depend on no parameter to train",
                every_rank=False,
            )
        # A strategy may return an iterator, and tensors instead of numbers.
        terms = [Term(term.peer, float(term.weight), float(term.tau)) for term in terms]
        peers = {term.peer: logits[term.peer] for term in terms}

        def run(z: Tensor, y: Tensor, *z_peers: Tensor) -> Tensor:
            return objective(z, y, dict(zip(peers, z_peers, strict=True)), terms)

        return self.graphs.functions.differentiable(tuple(terms), run, z, y, *peers.values())

    def backward(self, loss: Tensor | None, step: int) -> None:
        """Compute this rank's gradients and start to sum them over the network's ranks.

        loss: None for an empty shard, which adds nothing to the sum. With accumulation, gradients
        stay on this rank until the last step of their window.
        """
        self.backward_parts([loss], step, [0])

    @_with_own_code_errors
    def backward_parts(
        self, losses: Iterable[Tensor | None], step: int, begins: Iterable[int]
    ) -> None:
        """Do the same for the losses of this rank's micro-batches, in their order.

        begins: for each, the index of its first sample in the batch, on which random numbers of
        the backward pass depend.
        """
        with self.timer:
            self.optimizer_step.begin(step)
            for loss, begin in zip(losses, begins, strict=True):
                if loss is not None:
                    key = mix_one(self.forward_pass.seed, step, begin, BACKWARD)
                    seed_generators(key, loss.device)
                    self.optimizer_step.scale(loss, step).backward()  # type: ignore[no-untyped-call]
                self.optimizer_step.reducer.part_done()
            self.optimizer_step.reducer.complete()

    def update(self, step: int) -> None:
        """Make the optimizer step if `step` ends an accumulation window.

        Call this in every step, also if the network is paused. NonFiniteError as in
        `OptimizerStep.apply`.
        """
        if self.buffers is not None:
            self.buffers.finish()
        if self.optimizer_step.is_due(step):
            with self.timer:
                self.optimizer_step.apply(self.model, self.name, step)
