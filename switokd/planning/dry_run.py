"""A dry run: builds everything that a run file names, and makes one training step.

The step is `training/step.py`, with all networks in this process, on a few images of full shape.
If the data set is in the catalog, the images are random and the data set need not be present;
any other data set is opened. Nothing is written.

Not covered: torch.compile and CUDA graphs; the coordinator and exchanges between processes; whether
a whole batch fits into memory (only estimated); whether the networks learn.
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
from switokd.errors import (
    SwitokdError,
    UsageError,
    first_line,
    own_code_error,
    own_code_errors,
)
from switokd.models import registry
from switokd.planning.pauses import expected_pauses
from switokd.planning.profile import saved_profile
from switokd.planning.profiler import kept_by_forward
from switokd.runtime.device import choose_device
from switokd.runtime.environment import Environment
from switokd.runtime.lifecycle import told
from switokd.runtime.placement import LocalPlacement, replicated
from switokd.runtime.process_group import World
from switokd.training.build import (
    Models,
    check_shards,
    make_learners,
    make_model,
    tf32,
)
from switokd.training.exchange import Exchange
from switokd.training.learner import Learner
from switokd.training.step import StepContext, train_step


@dataclass(frozen=True)
class NetworkReport:
    """The results of the dry run for one network."""

    name: str
    role: str
    model: str
    parameters: int
    output: tuple[int, ...]
    loss: float
    """Loss of the step; NaN for a frozen network."""
    seconds: float
    """Time of forward, backward and update in the step."""
    memory_bytes: int
    """Estimated memory on a rank with its shard of a whole batch."""


@dataclass(frozen=True)
class DryRun:
    """The results of a dry run. With problems, all other fields have their defaults."""

    problems: tuple[str, ...] = ()
    networks: tuple[NetworkReport, ...] = ()
    device: str = "cpu"
    batch: int = 0
    """Number of images of the step."""
    images: Images | None = None
    decision: Decision | None = None


@dataclass
class CheckedNetwork:
    """Calls a network, checks its logits, and measures time and memory of the call."""

    name: str
    model: nn.Module
    classes: int
    device: torch.device
    seconds: float = 0.0
    kept: int = 0
    """Bytes that the forward pass keeps for the backward pass."""
    output: tuple[int, ...] = field(default=())

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits `[B, classes]` of images `x` `[B, C, H, W]`.

        Raises UsageError, with the network's name, if the forward pass fails, or if the logits have
        a wrong shape, are not finite or depend on no parameter.
        """
        started = _now(self.device)
        try:
            with kept_by_forward(self.model) as kept:
                z: Tensor = self.model(x)
        except UsageError as error:  # of the hook that finds the logits
            raise UsageError(f"networks.{self.name}: {error}") from error.__cause__
        except BaseException as error:
            what = (
                f"networks.{self.name}: its forward pass fails in training on images of shape "
                f"{list(x.shape)}"
            )
            if found := own_code_error(error, what):
                raise found from error
            if not isinstance(error, Exception):
                raise
            raise UsageError(f"{what}: {first_line(error)}") from error
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
    """Build what `config` names and make one step with at most `batch` images.

    Mistakes in the run file, the networks or the data are in the result's `problems`.
    """
    try:
        with own_code_errors():
            device = choose_device(config.device, Environment())
            images = images_for(config)
    except SwitokdError as error:
        return DryRun((told(error),))
    problems: list[str] = []
    built: dict[str, nn.Module] = {}
    for name in config.topology:
        built[name] = _build(config, name, images, built, problems)
    try:
        if config.placement != "auto":
            check_shards(config, config.placement_on(1), images)
        else:
            expected_pauses(config.method, config.auto)
            for path in config.auto.profiles:
                saved_profile(config, Path(path), images.shape, images.classes)
    except SwitokdError as error:
        problems.append(told(error))
    if problems:
        return DryRun(tuple(problems))
    try:
        with tf32(config.compute), own_code_errors():
            return _step(config, built, images, batch, device)
    except SwitokdError as error:
        return DryRun((told(error),))


def _build(
    config: Config, name: str, images: Images, built: Models, problems: list[str]
) -> nn.Module:
    """Build a network; if it cannot be built or does not fit the data, append to `problems`."""
    try:
        return make_model(config, name, images, built)
    except UsageError as error:
        problems.append(told(error.under(f"networks.{name}")))
        return nn.Identity()


def _step(
    config: Config, built: dict[str, nn.Module], images: Images, batch: int, device: torch.device
) -> DryRun:
    """Make one step and report on it; SwitokdError if the step fails."""
    update = {
        "compute": config.compute.model_copy(update={"compile": False, "cuda_graphs": False}),
        "schedule": config.schedule.model_copy(update={"accumulate": 1}),
    }
    config = config.model_copy(update=update)
    place = LocalPlacement(replicated(config.topology, 1), 0)
    learners, checked = [], {}
    for learner in make_learners(config, place, built, World(Environment(), device), images):
        network = CheckedNetwork(learner.name, learner.model, images.classes, device)
        checked[learner.name] = network
        forward_pass = replace(learner.forward_pass, module=network)
        learners.append(replace(learner, forward_pass=forward_pass))
        learner.optimizer_step.apply_unchecked()  # they are described below
        if learner.optimizer_step.scaler:  # its initial scale can make gradients overflow
            learner.optimizer_step.scaler.update(1.0)
    size = min(batch, config.data.batch_size)
    data = images.config.model_copy(update={"batch_size": size, "workers": 0})
    stream = prefetch(replace(images, config=data).stream(1), device, config.compute.channels_last)
    x, y = next(stream)
    size = len(y)  # a small data set may have fewer images
    decider = LocalDecider(config, lambda decision: None)
    soft = config.data.has_soft_targets
    exchange = Exchange(place, config.digest, images.classes, soft_targets=soft)
    try:
        context = StepContext(learners, config.method, exchange, decider)
        result = train_step(context, 1, x, y, size)
        losses = {name: loss.item() for name, loss in result.losses.items()}
        for learner in learners:
            # A teacher that is paused in this step may be trained in a later one: try it, too.
            if learner.name in result.paused and not learner.frozen:
                checked[learner.name].seconds = 0.0
                loss = objective(learner.forward(x), y, {}, [])
                learner.backward(loss, 1)
                learner.update(1)
                losses[learner.name] = loss.item()
    except RuntimeError as error:  # of autograd, or out of memory
        raise UsageError(f"the training step fails: {first_line(error)}") from error
    problems = [line for learner in learners for line in _problems(learner, losses)]
    if problems:
        return DryRun(tuple(problems))
    rows = [_network_report(config, li, checked[li.name], losses, size) for li in learners]
    return DryRun((), tuple(rows), device.type, size, images, decider.decision(1))


def _problems(learner: Learner, losses: dict[str, float]) -> list[str]:
    """Describe what is wrong with a network after the step, one sentence per problem."""
    if learner.frozen:
        return []
    key, parameters = f"networks.{learner.name}", learner.parameters
    gradients = [p.grad for p in parameters if p.grad is not None]
    problems = []
    if not torch.tensor(losses[learner.name]).isfinite():
        problems.append(f"{key}: its loss is {losses[learner.name]} in the first step")
    if not all(g.isfinite().all() for g in gradients):
        problems.append(f"{key}: its gradients are not finite in the first step")
    elif not all(p.isfinite().all() for p in parameters):
        problems.append(
            f"{key}: its weights are not finite after the first step; the usual remedy is a "
            f"lower {key}.optimizer.lr"
        )
    return problems


def _network_report(
    config: Config, learner: Learner, network: CheckedNetwork, losses: dict[str, float], size: int
) -> NetworkReport:
    """Report on one network. size: images of the step, from which the memory is extrapolated."""
    shard = config.data.batch_size
    if config.placement != "auto":
        shards = config.placement_on(1).shards(learner.name, config.data.batch_size)
        shard = max(s.stop - s.start for s in shards.values())
    weights = [*learner.model.parameters(), *learner.model.buffers()]
    gradients = [p.grad for p in learner.parameters if p.grad is not None]
    state = [v for s in learner.optimizer.state.values() for v in s.values()]
    fixed = sum(t.nbytes for t in [*weights, *gradients, *state] if isinstance(t, Tensor))
    return NetworkReport(
        name=learner.name,
        role=learner.role.value,
        model=config.networks[learner.name].model,
        parameters=registry.parameter_count(learner.model),
        output=network.output,
        loss=losses.get(learner.name, float("nan")),
        seconds=network.seconds + learner.timer.seconds,
        memory_bytes=fixed + round(network.kept * shard / size),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
