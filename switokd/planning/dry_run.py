"""A dry run: everything that a run file names is built, and one training step is made.

The step is that of `step.py`, of all networks in this process, at the data's full image shape and
classes, on a batch of a few images. Of a data set that is known by name the images are noise, and
it need not be here; any other is opened, and its own first images are used. Nothing is written.

Not covered: torch.compile and CUDA graphs; exchanges between processes and the coordinator;
whether a whole batch fits into memory, which is only estimated; whether anything is learned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from switokd.config.config import Config
from switokd.coordination.local import LocalDecider
from switokd.data.images import Images
from switokd.data.prefetch import prefetch
from switokd.data.synthetic import images_for
from switokd.distillation.decision import Decision
from switokd.distillation.losses import objective
from switokd.errors import SwitokdError, UsageError, first_line
from switokd.models import registry
from switokd.planning.pauses import expected_pauses
from switokd.planning.profile import saved_profile
from switokd.planning.profiler import kept_by_forward
from switokd.runtime.device import choose_device
from switokd.runtime.environment import Environment
from switokd.runtime.placement import LocalPlacement, replicated
from switokd.runtime.process_group import World
from switokd.training.build import (
    check_shards,
    make_learners,
    make_model,
    tf32,
)
from switokd.training.exchange import Exchange
from switokd.training.learner import Learner
from switokd.training.step import train_step


@dataclass(frozen=True)
class NetworkReport:
    """What was found of one network."""

    name: str
    role: str
    model: str
    parameters: int
    output: tuple[int, ...]
    loss: float
    """Of the few images; NaN for a frozen network, which has none."""
    seconds: float
    """Forward, backward and update with the few images."""
    memory_bytes: int
    """Estimate for a rank of this network's with its part of a whole batch."""


@dataclass(frozen=True)
class DryRun:
    """All that was found. `rows` are there only if there was no problem."""

    problems: tuple[str, ...] = ()
    rows: tuple[NetworkReport, ...] = ()
    device: str = "cpu"
    batch: int = 0
    """Images of the step."""
    images: Images | None = None
    decision: Decision | None = None


@dataclass
class Watched:
    """A network as it is called in the step, and what its call was seen to do."""

    name: str
    model: nn.Module
    classes: int
    device: torch.device
    seconds: float = 0.0
    kept: int = 0
    """Bytes that forward keeps for backward."""
    output: tuple[int, ...] = field(default=())

    def __call__(self, x: Tensor) -> Tensor:
        """Forward. UsageError, naming the network, if it fails or gives no logits to learn from."""
        started = _now(self.device)
        try:
            with kept_by_forward(self.model) as kept:
                z: Tensor = self.model(x)
        except Exception as error:
            raise UsageError(
                f"networks.{self.name}: its forward pass fails in training, on images of "
                f"{list(x.shape)}: {first_line(error)}"
            ) from error
        self.seconds += _now(self.device) - started
        self.kept = sum(kept.values())
        expected = (len(x), self.classes)
        self.output = tuple(z.shape) if isinstance(z, Tensor) else ()
        if self.output != expected:
            raise UsageError(
                f"networks.{self.name}: in training it must turn {len(x)} images into logits of "
                f"shape {expected}, got {self.output or type(z).__name__}"
            )
        if torch.is_grad_enabled() and not z.requires_grad:
            raise UsageError(f"networks.{self.name}: its logits depend on no parameter to train")
        if not z.isfinite().all():
            raise UsageError(f"networks.{self.name}: its logits are not finite at the first step")
        return z


def dry_run(config: Config, batch: int = 4) -> DryRun:
    """Build what `config` names and make one step with `batch` images, or fewer if it has fewer.

    What is wrong with the run file, its networks or its data is in `problems`, a line each.
    """
    try:
        device = choose_device(config.device, Environment())
        images = images_for(config)
    except SwitokdError as error:
        return DryRun((str(error),))
    problems: list[str] = []
    built = {name: _build(config, name, images, problems) for name in config.topology}
    try:
        if config.placement != "auto":
            check_shards(config, config.placement_on(1), images)
        else:
            expected_pauses(config.method, config.auto)
            for path in config.auto.profiles:
                saved_profile(config, Path(path), images.shape, images.classes)
    except SwitokdError as error:
        problems.append(str(error))
    if problems:
        return DryRun(tuple(problems))
    try:
        with tf32(config.compute):
            return _step(config, built, images, batch, device)
    except SwitokdError as error:
        return DryRun((str(error),))


def _build(config: Config, name: str, images: Images, problems: list[str]) -> nn.Module:
    """One network; if it cannot be built, or does not fit the data, that goes to `problems`."""
    try:
        return make_model(config, name, images)
    except UsageError as error:
        problems.append(f"networks.{name}: {error}")
        return nn.Identity()


def _step(
    config: Config, built: dict[str, nn.Module], images: Images, batch: int, device: torch.device
) -> DryRun:
    """One step; SwitokdError if it cannot be made."""
    update = {
        "compute": config.compute.model_copy(update={"compile": False, "cuda_graphs": False}),
        "schedule": config.schedule.model_copy(update={"accumulate": 1}),
    }
    config = config.model_copy(update=update)
    place = LocalPlacement(replicated(config.topology, 1), 0)
    learners, watched = [], {}
    for learner in make_learners(config, place, built, World(Environment(), device), images):
        watched[learner.name] = Watched(learner.name, learner.model, images.classes, device)
        learners.append(replace(learner, network=watched[learner.name]))
        if learner.updates.scaler:  # else gradients may overflow by the scale alone, at first
            learner.updates.scaler.update(1.0)
    size = min(batch, config.data.batch_size)
    data = images.config.model_copy(update={"batch_size": size, "workers": 0})
    few = prefetch(replace(images, config=data).stream(1), device, config.compute.channels_last)
    x, y = next(few)
    size = len(y)  # a data set may have fewer
    decider = LocalDecider(config, lambda decision: None)
    soft = config.data.has_soft_targets
    exchange = Exchange(place, config.digest, images.classes, soft_targets=soft)
    try:
        result = train_step(learners, 1, x, y, size, config.method, exchange, decider)
        losses = {name: loss.item() for name, loss in result.losses.items()}
        for learner in learners:
            # A teacher that this batch happened to pause has its turn later in the run.
            if learner.name in result.paused and not learner.frozen:
                watched[learner.name].seconds = 0.0
                loss = objective(learner.forward(x), y, {}, [])
                learner.backward(loss, 1)
                learner.update(1)
                losses[learner.name] = loss.item()
    except RuntimeError as error:  # autograd's, or out of memory
        raise UsageError(f"the training step fails: {first_line(error)}") from error
    problems = [line for learner in learners for line in _problems(learner, losses)]
    if problems:
        return DryRun(tuple(problems))
    rows = [_row(config, li, watched[li.name], losses, size) for li in learners]
    return DryRun((), tuple(rows), device.type, size, images, decider.decision(1))


def _problems(learner: Learner, losses: dict[str, float]) -> list[str]:
    """What one step shows to be wrong with a network's training, a sentence each."""
    if learner.frozen:
        return []
    where, parameters = f"networks.{learner.name}", learner.gradients.parameters
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = []
    if not torch.tensor(losses[learner.name]).isfinite():
        found.append(f"{where}: its loss is {losses[learner.name]} in the first step")
    if not all(g.isfinite().all() for g in gradients):
        found.append(f"{where}: its gradients are not finite in the first step")
    elif not all(p.isfinite().all() for p in parameters):
        found.append(
            f"{where}: its weights are not finite after the first step; the usual remedy is a "
            f"lower {where}.optimizer.lr"
        )
    return found


def _row(
    config: Config, learner: Learner, seen: Watched, losses: dict[str, float], size: int
) -> NetworkReport:
    shard = config.data.batch_size
    if config.placement != "auto":
        shards = config.placement_on(1).shards(learner.name, config.data.batch_size)
        shard = max(s.stop - s.start for s in shards.values())
    weights = [*learner.model.parameters(), *learner.model.buffers()]
    gradients = [p.grad for p in learner.gradients.parameters if p.grad is not None]
    state = [v for s in learner.optimizer.state.values() for v in s.values()]
    held = sum(t.nbytes for t in [*weights, *gradients, *state] if isinstance(t, Tensor))
    return NetworkReport(
        name=learner.name,
        role=learner.role.value,
        model=config.networks[learner.name].model,
        parameters=registry.parameter_count(learner.model),
        output=seen.output,
        loss=losses.get(learner.name, float("nan")),
        seconds=seen.seconds + learner.learning.seconds,
        memory_bytes=held + round(seen.kept * shard / size),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
