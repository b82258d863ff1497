"""Building learners: compilation before the first step, optimizers, precision settings.

Not covered: GPUs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.in_process import ONE_PROCESS, InProcess
from switokd.config.config import Config
from switokd.config.run_file import load
from switokd.config.sections import Compute
from switokd.data.images import open_images
from switokd.errors import UsageError
from switokd.runtime.environment import Environment
from switokd.runtime.process_group import World
from switokd.training.batch_norm import check_batch_norm
from switokd.training.build import check_shards, make_learner, tf32, to_compute_format
from switokd.training.learner import Learner
from switokd.training.schedules import AccumulationWindow
from switokd.training.warm_up import compile_ahead

NAMES = ("t1", "t2", "t3", "t4", "s")  # two batch sizes each: more than PyTorch's limit for a class
RUN_FILE: dict[str, Any] = {
    **ONE_PROCESS,
    "name": "compiled",
    "device": "cpu",
    "data": {"dataset": "digits", "batch_size": 8, "train_samples": 12, "drop_last": False},
    "networks": {
        name: {"role": "student" if name == "s" else "teacher", "model": "tests.sleepers:Flat"}
        for name in NAMES
    },
    "compute": {"compile": True},
    "schedule": {"epochs": 2},
}


@pytest.mark.timeout(180)
def test_no_training_step_compiles() -> None:
    config = Config.model_validate(RUN_FILE)
    torch.compiler.reset()
    ours = InProcess(config)
    strict = {"error_on_recompile": True, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(strict), torch.compiler.set_stance("fail_on_recompile"):
        sizes = [len(ours.step(x, y).y) for x, y in ours.batches(4)]
    assert sizes == [8, 4, 8, 4]
    assert torch._dynamo.config.recompile_limit >= 2 * len(NAMES)


class Normed(nn.Module):
    """A small network with a convolution and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.norm(self.convolution(x)).relu().mean(dim=(2, 3)))
        return z


@pytest.mark.timeout(180)
def test_compiled_networks_train_like_eager_ones() -> None:
    """Compiling before the first step changes neither statistics nor gradients."""
    networks = {
        name: {"role": role, "model": "tests.training.test_build:Normed", "optimizer": {"lr": 0.1}}
        for name, role in {"t": "teacher", "s": "student"}.items()
    }
    ours = []
    for compiled in (False, True):
        torch.compiler.reset()
        raw = {**RUN_FILE, "networks": networks, "compute": {"compile": compiled}}
        ours.append(InProcess(Config.model_validate(raw)))
    first, before = ([learner.model.state_dict() for learner in one.learners] for one in ours)
    for eager_state, compiled_state in zip(first, before, strict=True):
        assert all(torch.equal(value, compiled_state[key]) for key, value in eager_state.items())
    for one in ours:
        for x, y in one.batches(6):
            one.step(x, y)
    eager, compiled_ones = (one.learners for one in ours)
    for learner, other in zip(eager, compiled_ones, strict=True):
        assert learner.forward_pass.module is learner.model
        assert other.forward_pass.module is not other.model
        torch.testing.assert_close(
            dict(learner.model.state_dict()), dict(other.model.state_dict()), rtol=1e-4, atol=1e-5
        )


def test_sync_batch_norm_needs_a_gpu_per_rank_and_samples_on_all_ranks() -> None:
    settings = ["device=auto", "compute.batch_norm=sync", "networks.student.ranks=2"]
    config = load("digits-1t1s", settings)
    placement = config.placement_on(3)
    world = World(Environment(world_size=3), torch.device("cpu"))
    with pytest.raises(UsageError, match=r"sync needs a GPU of its own for each rank of student"):
        check_batch_norm(config, placement, world)
    check_batch_norm(config, placement, replace(world, backend="nccl"))
    one_rank_each = load("digits-1t1s", settings[:2])
    check_batch_norm(one_rank_each, one_rank_each.placement_on(2), world)

    def check(*more: str) -> None:
        made = load("digits-1t1s", [*settings, *more])
        check_shards(made, placement, open_images(made.data, made.seed))

    check()
    check("data.drop_last=false")  # 29 images are enough for two ranks
    short = "data.batch_size=1436", "data.drop_last=false", "data.train_samples=1437"
    check(*short)  # a last batch of one image is dropped
    with pytest.raises(UsageError, match=r"last batch of 2 images leaves a rank of student"):
        check("data.batch_size=1435", "data.drop_last=false", "networks.student.ranks=2")


def test_out_of_memory_while_compiling_is_not_a_usage_error() -> None:
    """The profiler skips a batch size that does not fit."""
    config = Config.model_validate({**RUN_FILE, "compute": {"compile": False}})
    learner = InProcess(config).learners[0]

    def full(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    # Generated code is nobody's own, like PyTorch's.
    broken = eval("lambda x: (_ for _ in ()).throw(RuntimeError('no g++'))")

    def with_module(module: Callable[[Tensor], Tensor]) -> Learner:
        return replace(learner, forward_pass=replace(learner.forward_pass, module=module))

    with pytest.raises(torch.OutOfMemoryError):
        compile_ahead(with_module(full), torch.randn(2, 1, 8, 8))
    with pytest.raises(UsageError, match=r"cannot compile t1: no g\+\+; a CPU needs"):
        compile_ahead(with_module(broken), torch.randn(2, 1, 8, 8))


class Branching(nn.Module):
    """Uses its second layer from the third forward pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 10), nn.Linear(10, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.first(x.flatten(1))
        self.calls += 1
        return self.second(z) if self.calls > 2 else z


def test_a_weight_may_get_its_first_gradient_later_than_others() -> None:
    """Without prepared momentum, PyTorch's fused SGD (our default) would fail here."""
    config, model = load("digits-1t1s"), Branching()
    reference = copy.deepcopy(model)
    world = World(Environment(), torch.device("cpu"))
    ours = make_learner(config, "student", model, world, None, AccumulationWindow())
    assert ours.optimizer.defaults["fused"]
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(1, 6):
        x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
        ours.backward(F.cross_entropy(ours.forward(x, step), y), step)
        ours.update(step)
        theirs.zero_grad()
        F.cross_entropy(reference(x), y).backward()  # type: ignore[no-untyped-call]
        theirs.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(reference.named_parameters()))


BACKENDS: Any = torch.backends
"""Typed as Any, because mypy does not know the `fp32_precision` settings."""


def test_cuda_graphs_are_the_default_for_this_packages_networks() -> None:
    def wanted(*settings: str) -> list[bool]:
        config = load("digits-2t1s", list(settings))
        return [config.wants_cuda_graphs(name) for name in config.networks]

    own_model = "networks.student.model=tests.sleepers:Flat"
    assert wanted() == [True] * 3
    assert wanted(own_model) == [True, True, False]
    assert wanted("networks.student.model=resnet18", "data.dataset=cifar10")[2] is False
    assert wanted("schedule.accumulate=2") == [False] * 3
    assert wanted("device=auto", "compute.batch_norm=sync") == [False] * 3
    assert wanted(own_model, "compute.cuda_graphs=true") == [True] * 3
    assert wanted("compute.cuda_graphs=false") == [False] * 3


@pytest.fixture
def _default_precision() -> Iterator[None]:
    """Restore PyTorch's default precision after the test."""
    backends = BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul
    defaults = [backend.fp32_precision for backend in backends]
    yield
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(backends, defaults, strict=True):
        backend.fp32_precision = precision


@pytest.mark.skipif(
    not hasattr(BACKENDS.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9"
)
@pytest.mark.usefixtures("_default_precision")
@pytest.mark.parametrize("set_before", ["nothing", "matmul", "everything", "older"])
def test_tf32_restores_the_precision_settings(set_before: str) -> None:
    if set_before == "matmul":
        BACKENDS.cuda.matmul.fp32_precision = "tf32"
    elif set_before == "everything":
        BACKENDS.fp32_precision = "tf32"
    elif set_before == "older":
        torch.set_float32_matmul_precision("medium")

    def precisions() -> list[str]:
        try:
            named = torch.get_float32_matmul_precision()
        except RuntimeError:
            named = "no one name"
        backends = BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS
        return [named, *(backend.fp32_precision for backend in backends)]

    before = precisions()
    with tf32(Compute(precision="fp32")):
        assert precisions() == before
    with tf32(Compute(precision="tf32")):
        assert BACKENDS.cuda.matmul.fp32_precision == "tf32"
    assert precisions() == before
    BACKENDS.fp32_precision = "tf32"  # applies to all settings that were not set
    assert precisions()[1] == "tf32"


class ForgetsToReturn(nn.Linear):
    """A network with a `train` of its own, as people write it to keep BatchNorm frozen."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_train_method_that_returns_nothing_is_enough(channels_last: bool) -> None:
    model = ForgetsToReturn(2, 2)
    model.training = False
    got = to_compute_format(model, Compute(channels_last=channels_last), torch.device("cpu"))
    assert got is model
    assert got.training
