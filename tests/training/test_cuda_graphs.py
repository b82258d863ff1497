"""Training with CUDA graphs gives the same bits as training without them.

A CUDA graph launches the same kernels on the same memory again. These tests need no GPU: `Rerun`
repeats PyTorch's calls instead of kernels. All code that uses the graphs is the real code.

Not covered: capturing on a GPU (`test_gpu.py`); the gain in speed (`bench/gpu.py`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from bench.in_process import ONE_PROCESS, InProcess
from switokd.config.config import Config
from switokd.distillation.couplings import Couplings
from switokd.distillation.decision import Decision
from switokd.distillation.strategies.base import Strategy
from switokd.errors import UsageError
from switokd.runtime.environment import Environment
from switokd.runtime.process_group import World
from switokd.training.build import make_learner
from switokd.training.cuda_graphs import (
    GraphCapture,
    GraphContext,
    GraphedFunctions,
    GraphedModel,
)
from switokd.training.schedules import AccumulationWindow
from switokd.training.warm_up import warm_up

T = TypeVar("T")
STEPS = 12
MODEL = "tests.training.test_cuda_graphs:Net"
RUN_FILE: dict[str, Any] = {
    **ONE_PROCESS,
    "name": "graphed",
    "device": "cpu",
    "data": {"dataset": "digits", "batch_size": 8, "train_samples": 28, "drop_last": False},
    "networks": {
        "t1": {"role": "teacher", "model": MODEL, "optimizer": {"lr": 0.1}},
        "t2": {"role": "teacher", "model": MODEL, "optimizer": {"lr": 0.05}, "clip_norm": 0.1},
        "s": {"role": "student", "model": MODEL, "optimizer": {"name": "adam", "lr": 0.001}},
    },
    "distillation": {"temperature": 0.25},
    "schedule": {"epochs": 4},
}
"""Batches of 8, 8, 8 and 4 images."""


class Net(nn.Module):
    """A network with all that a graph must repeat: statistics, dropout, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(4, 10)
        self.unused = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.zeros(10))  # has the same gradient as the head's bias

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.convolution(x)).relu().mean(dim=(2, 3))
        return F.linear(self.dropout(z), self.head.weight, self.head.bias + self.shift)


class Rerun(GraphCapture):
    """Calls the function again at each replay, and overwrites its first result."""

    def __init__(self, context: GraphContext) -> None:
        """Creates neither a stream nor a memory pool."""
        self.context = context

    def warm_up(self, run: Callable[[], T]) -> T:
        run()
        return run()

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        result = run()

        def replay() -> None:
            for old, new in zip(_tensors(result), _tensors(run()), strict=True):
                old.copy_(new)

        return result, replay


def _tensors(result: Any) -> Sequence[Tensor]:
    """The tensors of a result, which is one tensor or several; some may be None."""
    results = result if isinstance(result, (list, tuple)) else [result]
    return [tensor for tensor in results if tensor is not None]


@pytest.fixture(autouse=True)
def _captures_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switokd.training.build.can_capture", lambda device: True)
    monkeypatch.setattr("switokd.training.cuda_graphs.GraphCapture", Rerun)


class Trained:
    """A finished training, with or without CUDA graphs."""

    def __init__(self, graphed: bool, **sections: Any) -> None:
        compute = {**sections.pop("compute", {}), "cuda_graphs": graphed}
        ours = InProcess(Config.model_validate({**RUN_FILE, **sections, "compute": compute}))
        self.batch_sizes = {li.name: li.graphs.batch_sizes for li in ours.learners}
        self.losses: list[Tensor] = []
        self.paused = 0
        for x, y in ours.batches(STEPS):
            result = ours.step(x, y)
            self.losses += [loss.clone() for loss in result.losses.values()]
            self.paused += len(result.paused)
        self.models = {li.name: li.model for li in ours.learners}
        self.graphed_functions = [li.graphs.functions for li in ours.learners]
        self.averages = [li.averaged for li in ours.learners if li.averaged is not None]


def assert_same(graphed: Trained, eager: Trained) -> None:
    """Check that two trainings are equal to the last bit."""
    assert graphed.paused == eager.paused
    assert torch.equal(torch.stack(graphed.losses), torch.stack(eager.losses))
    for one, other in zip(graphed.averages, eager.averages, strict=True):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    for name, model in eager.models.items():
        state = graphed.models[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        gradients = {key: p.grad for key, p in graphed.models[name].named_parameters()}
        assert gradients["unused.weight"] is None


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"compute": {"precision": "bf16"}},
        {"compute": {"precision": "fp16"}},
        {"compute": {"channels_last": False, "fused_optimizer": False}},
        {"schedule": {"epochs": 4, "ema_decay": 0.9}},
        {"distillation": {"strategy": "dml"}},
    ],
    ids=str,
)
def test_graphs_train_as_eager_networks(sections: dict[str, Any]) -> None:
    graphed, eager = Trained(True, **sections), Trained(False, **sections)
    assert_same(graphed, eager)
    assert graphed.batch_sizes == {"t1": [4, 8], "t2": [4, 8], "s": [4, 8]}
    assert eager.batch_sizes == {"t1": [], "t2": [], "s": []}
    assert (eager.paused > 0) == (sections.get("distillation") != {"strategy": "dml"})


def test_a_batch_size_without_a_graph_is_computed_eagerly() -> None:
    ours = InProcess(Config.model_validate({**RUN_FILE, "compute": {"cuda_graphs": True}}))
    learner, x = ours.learners[0], torch.randn(3, 1, 8, 8)
    assert learner.graphs.batch_sizes == [4, 8]
    eager = learner.eager()
    assert torch.equal(learner.forward(x, 1), eager.forward(x, 1))
    assert not torch.equal(learner.forward(x, 1), eager.forward(x, 2))  # other dropout masks


def test_a_frozen_teacher_is_captured_without_backward(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    given = {"model": MODEL, "role": "teacher", "weights": str(tmp_path / "net.pt")}
    networks = {**RUN_FILE["networks"], "t1": given, "t2": given}
    kd = {"networks": networks, "distillation": {"strategy": "kd"}}
    graphed, eager = Trained(True, **kd), Trained(False, **kd)
    assert graphed.batch_sizes == {"t1": [4, 8], "t2": [4, 8], "s": [4, 8]}
    assert_same(graphed, eager)
    assert all(p.grad is None for p in graphed.models["t1"].parameters())


def test_ranks_sum_the_gradients_of_a_graph() -> None:
    """No hook sees these gradients, so they are sent after backward."""
    x, y = torch.randn(3, 8, 1, 8, 8), torch.randint(10, (3, 8))
    store = HashStore()  # only this process uses it
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        states = []
        for graphed in (True, False):
            torch.manual_seed(0)
            world, group = World(Environment(), torch.device("cpu")), torch.distributed.group.WORLD
            config = Config.model_validate({**RUN_FILE, "compute": {"cuda_graphs": graphed}})
            learner = make_learner(config, "t1", Net(), world, group, AccumulationWindow())
            warm_up(learner, 8, (1, 8, 8), config.compute)
            assert len(learner.graphs.batch_sizes) == graphed
            for step in range(3):
                loss = F.cross_entropy(learner.forward(x[step], step), y[step])
                learner.backward(loss, step)
                learner.update(step)
            states.append(learner.model.state_dict())
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    assert not torch.equal(states[0]["head.bias"], torch.zeros(10))


def test_a_function_reads_graph_memory_directly_and_copies_other_inputs() -> None:
    graphed_functions, calls = GraphedFunctions(GraphContext(torch.device("cpu"))), []

    def double(x: Tensor) -> Tensor:
        calls.append(x.data_ptr())
        return 2 * x

    def triple(x: Tensor) -> Tensor:
        calls.append(x.data_ptr())
        return 3 * x

    for n in range(4):
        given = torch.full((3,), float(n))
        doubled = graphed_functions("double", double, given)
        assert doubled.tolist() == [2.0 * n] * 3
        assert graphed_functions("triple", triple, doubled).tolist() == [6.0 * n] * 3
    kept = doubled.data_ptr()
    # `double` is captured at its second call, on a copy of its input. From then on its result lies
    # in graph memory, which is another cache key for `triple`: called, captured, replayed.
    assert calls[2] not in (kept, given.data_ptr())
    assert calls[-1] == calls[-3] == kept
    # Memory of other tensors is copied: it is neither overwritten nor read through graph memory.
    other = torch.ones(3)
    assert [graphed_functions("triple", triple, other).tolist() for _ in range(3)] == [
        [3.0] * 3
    ] * 3
    assert (other.tolist(), doubled.tolist()) == ([1.0] * 3, [6.0] * 3)
    # The same graph memory with other strides is another cache key.
    for _ in range(3):
        square = graphed_functions("double", double, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    for _ in range(3):
        whole = [graphed_functions("triple", triple, x).tolist() for x in (square, square.T)]
        assert whole == [[[6.0, 12.0], [18.0, 24.0]], [[6.0, 18.0], [12.0, 24.0]]]


def test_a_captured_function_has_the_eager_gradient() -> None:
    graphed_functions, leaf = GraphedFunctions(GraphContext(torch.device("cpu"))), torch.randn(4, 3)
    for _ in range(4):
        y = torch.randint(3, (4,))
        pair = []
        for by in (graphed_functions, GraphedFunctions()):
            z = leaf.clone().requires_grad_()
            loss = by.differentiable("loss", F.cross_entropy, z, y)
            (loss * 0.25).backward()  # type: ignore[no-untyped-call]
            assert z.grad is not None
            pair.append((loss.item(), z.grad))
        assert pair[0][0] == pair[1][0]
        assert torch.equal(pair[0][1], pair[1][1])


def test_the_least_recently_used_graph_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy's weights may change in every step, and later stay the same."""
    monkeypatch.setattr("switokd.training.cuda_graphs.MAX_GRAPHS", 5)
    graphed_functions, called = GraphedFunctions(GraphContext(torch.device("cpu"))), []

    def identity(x: Tensor) -> Tensor:
        called.append(1)
        return x

    for weight in range(20):
        assert graphed_functions(weight, lambda x, w=weight: w * x, torch.ones(())).item() == weight
        assert graphed_functions("identity", identity, torch.ones(())).item() == 1
        assert len(graphed_functions._graphs) <= 5
    assert [graph is not None for graph in graphed_functions._graphs.values()] == [False] * 4 + [
        True
    ]
    assert len(called) == 1 + 1 + 19  # called, captured, then replayed


def test_a_function_that_cannot_be_captured_gives_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(capture: Rerun, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA errors")

    monkeypatch.setattr(Rerun, "capture", refuse)
    graphed_functions = GraphedFunctions(GraphContext(torch.device("cpu")))
    graphed_functions("double", lambda x: 2 * x, torch.ones(1))
    with pytest.raises(UsageError) as caught:
        graphed_functions("double", lambda x: 2 * x, torch.ones(1))
    assert str(caught.value) == (
        "compute.cuda_graphs: a step's losses, distances or exchange cannot be captured: operation "
        "not permitted when stream is capturing; use compute.cuda_graphs=false"
    )


def test_a_graph_keeps_the_memory_of_one_forward() -> None:
    network = nn.Linear(3, 2)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def compute(x: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        z: Tensor = network(x)
        made.append(weakref.ref(z))
        return z

    GraphedModel(
        compute,
        list(network.parameters()),
        torch.ones(4, 3),
        Rerun(GraphContext(torch.device("cpu"))),
    )
    assert alive == [0] * len(made)
    assert len(made) >= 5


class Remembers(Strategy):
    """A strategy that keeps logits, returns an iterator of terms, and adds a peer with a gradient.

    All networks learn from the mean logits of the last step.
    """

    def __init__(self) -> None:
        self.last: Mapping[str, Tensor] | None = None
        self.scale = nn.Parameter(torch.ones(()))

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> Any:
        yield from couplings.terms(network, ["before"])

    def combine(self, logits: Mapping[str, Tensor], y: Tensor) -> Mapping[str, Tensor]:
        before, self.last = self.last or logits, logits
        return {"before": self.scale * torch.stack(list(before.values())).mean(dim=0)}


def test_a_strategy_may_keep_the_logits_it_receives() -> None:
    data = {**RUN_FILE["data"], "train_samples": 24}
    graphed, eager, alone = (
        Trained(is_graphed, data=data, distillation={"strategy": strategy})
        for is_graphed, strategy in (
            (True, "tests.training.test_cuda_graphs:Remembers"),
            (False, "tests.training.test_cuda_graphs:Remembers"),
            (False, "vanilla"),
        )
    )
    assert_same(graphed, eager)
    assert not torch.allclose(torch.stack(eager.losses), torch.stack(alone.losses))
    cached = [
        graph for functions in graphed.graphed_functions for graph in functions._graphs.values()
    ]
    inputs = [copy for graph in cached if graph for _, copy in graph._copied]
    assert inputs
    assert not any(tensor.requires_grad for tensor in inputs), (
        "a kept input would keep the autograd graphs of all steps"
    )


def test_a_network_that_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(capture: Rerun, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA errors")
        finally:  # as PyTorch ends a failed capture
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(Rerun, "capture", refuse)
    with pytest.raises(UsageError) as caught:
        InProcess(Config.model_validate({**RUN_FILE, "compute": {"cuda_graphs": True}}))
    assert str(caught.value) == (
        "compute.cuda_graphs: t1 cannot be captured: operation not permitted when stream is "
        "capturing; its forward must do the same every time and read nothing from the GPU, or use "
        "compute.cuda_graphs=false"
    )


def test_out_of_memory_during_capture_is_not_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(capture: Rerun, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(Rerun, "capture", full)
    with pytest.raises(torch.OutOfMemoryError):
        InProcess(Config.model_validate({**RUN_FILE, "compute": {"cuda_graphs": True}}))


def test_a_network_is_freed_together_with_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference cycle would keep scarce GPU memory until Python's next collection."""
    # Unlike `Rerun`, a CUDA graph holds no reference to the captured function.
    monkeypatch.setattr(Rerun, "capture", lambda capture, run: (run(), lambda: None))
    ours = InProcess(Config.model_validate({**RUN_FILE, "compute": {"cuda_graphs": True}}))
    learner = ours.learners.pop()
    assert learner.graphs.batch_sizes == [4, 8]
    models = [weakref.ref(learner.model)]
    gc.disable()
    try:
        del learner
        assert models[0]() is None
    finally:
        gc.enable()
