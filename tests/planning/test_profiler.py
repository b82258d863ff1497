"""Measuring networks: known times are measured, and no state is changed.

Not covered: GPUs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from switokd.config.config import Config
from switokd.config.run_file import load
from switokd.errors import UsageError
from switokd.models.registry import build
from switokd.planning.profile import Profile
from switokd.planning.profiler import MIN_REPETITIONS, profile
from switokd.training.ema import MovingAverage
from switokd.training.learner import Learner
from switokd.training.reducer import BUCKET_BYTES
from switokd.training.warm_up import compile_ahead
from tests.training.test_cuda_graphs import Rerun

CPU = torch.device("cpu")
SLEEPERS = [
    "networks.teacher1.model=tests.sleepers:Sleeper",
    "networks.teacher1.model_kwargs={forward: 0.002, backward: 0.004}",
    "networks.teacher2.model=tests.sleepers:Sleeper",
    "networks.teacher2.model_kwargs={forward: 0.0005, backward: 0.0005}",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few repetitions: these tests need no exact times."""
    monkeypatch.setattr("switokd.planning.profiler.BUDGET_SECONDS", 0.02)


def measured(config: Config, sizes: tuple[int, ...] = (2, 4), **more: Any) -> Profile:
    return profile(config, (1, 8, 8), 10, CPU, sizes, **more)


def test_measured_times_contain_the_known_sleeping_times() -> None:
    found = measured(load("digits-2t1s", SLEEPERS), (4, 8, 16))
    one, two = found.networks["teacher1"], found.networks["teacher2"]
    assert one.samples == (4, 8, 16)
    for n, forward, backward in zip(
        one.samples, one.forward_seconds, one.backward_seconds, strict=True
    ):
        # Never less; more on a busy machine.
        assert 0.002 * n <= forward <= 0.008 * n + 0.2
        assert 0.004 * n <= backward <= 0.016 * n + 0.2
    assert two.forward_seconds[2] >= 0.0005 * 16


def test_sizes_in_bytes_are_those_of_weights_gradients_and_optimizer() -> None:
    config = load("digits-2t1s", ["networks.teacher2.optimizer={name: adam}"])
    found = measured(config)
    for name, states in (("teacher1", 1), ("teacher2", 2)):
        network = found.networks[name]
        model = build(config.networks[name].model, 1, 10)
        weights = sum(4 * p.numel() for p in model.parameters())
        assert network.gradient_bytes == weights
        assert network.parameter_bytes == weights + sum(b.nbytes for b in model.buffers())
        assert network.optimizer_bytes == pytest.approx(states * weights, rel=0.01)


def test_activation_bytes_of_a_linear_network() -> None:
    """The network keeps a mean over pixels and some copies of the logits."""
    found = measured(load("digits-2t1s", SLEEPERS), (64,))
    kept = found.networks["teacher1"].activation_bytes_per_sample
    assert 4 < kept < 40 * 10 * 4


def test_sizes_that_do_not_fit_into_memory_are_not_tried() -> None:
    """An operating system without free memory would kill the process."""
    flat = [f"networks.{name}.model=tests.sleepers:Flat" for name in ("teacher1", "teacher2")]
    config = load("digits-2t1s", flat)
    limit = measured(config, (2, 4, 64)).networks["student"].memory(8)
    assert measured(config, (2, 4, 64), memory=limit).networks["student"].samples == (2, 4)
    assert measured(config, (2, 4, 64), memory=1).sizes == (
        2,
    )  # the smallest size is always measured


def test_measuring_leaves_the_random_number_generator_unchanged() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measured(load("digits-2t1s", SLEEPERS))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_float32_matmul_precision() == "highest"


def test_profile_describes_the_conditions_of_measuring() -> None:
    found = measured(load("digits-2t1s", SLEEPERS))
    assert found.device == "cpu"
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.sizes == (2, 4)
    assert "assumed" in found.communication.description
    assert found.communication.bucket_bytes == BUCKET_BYTES
    found.check(load("digits-2t1s", SLEEPERS).networks)


def test_profile_says_whether_targets_are_soft() -> None:
    assert not measured(load("digits-1t1s"), (2,)).soft_targets
    assert measured(load("digits-1t1s", ["data.cutmix=1.0"]), (2,)).soft_targets


def test_progress_is_reported_per_size() -> None:
    calls: list[tuple[str, int, int]] = []
    measured(load("digits-2t1s", SLEEPERS), progress=lambda *call: calls.append(call))
    assert calls[0] == ("teacher1", 0, 9)
    assert calls[-1] == ("", 9, 9)
    assert [done for _, done, _ in calls] == list(range(10))


def test_measures_with_the_precision_of_the_run_file() -> None:
    small = [f"networks.{name}.model=tests.sleepers:Flat" for name in ("teacher1", "teacher2")]
    fp32, tf32, bf16 = (
        measured(load("digits-2t1s", [*small, f"compute.precision={p}"]), (8, 32)).networks[
            "student"
        ]
        for p in ("fp32", "tf32", "bf16")
    )
    assert tf32.activation_bytes_per_sample == fp32.activation_bytes_per_sample
    assert bf16.activation_bytes_per_sample < 0.8 * fp32.activation_bytes_per_sample
    assert bf16.activation_bytes_fixed > fp32.activation_bytes_fixed  # weights in bfloat16


def test_update_includes_clipping_and_moving_average(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def note(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def noted(*arguments: Any) -> Any:
            called.append(name)
            return call(*arguments)

        monkeypatch.setattr(owner, name, noted)

    note(torch.nn.utils, "clip_grad_norm_")
    note(MovingAverage, "update")
    plain, averaged = (
        measured(load("digits-1t1s", more), (2,)).networks["student"]
        for more in ([], ["schedule.ema_decay=0.9", "networks.student.clip_norm=1.0"])
    )
    assert averaged.parameter_bytes == 2 * plain.parameter_bytes
    assert averaged.gradient_bytes == plain.gradient_bytes
    assert set(called) == {"clip_grad_norm_", "update"}


def test_frozen_teachers_have_no_backward_pass() -> None:
    weights = [f"networks.{name}.weights=trained.pt" for name in ("teacher1", "teacher2")]
    found = measured(load("digits-2t1s", [*SLEEPERS, "distillation.strategy=kd", *weights]))
    teacher, student = found.networks["teacher1"], found.networks["student"]
    assert min(teacher.forward_seconds) >= 2 * 0.002
    assert (
        max(teacher.backward_seconds) < 2 * 0.004
    )  # the shortest backward pass would sleep as long
    assert teacher.gradient_bytes == teacher.optimizer_bytes == 0
    assert teacher.activation_bytes_per_sample == teacher.activation_bytes_fixed == 0
    assert student.gradient_bytes > 0


def test_compiled_networks_are_measured_at_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def counted(learner: Learner, x: Tensor) -> None:
        compiled.append(len(x))
        compile_ahead(learner, x)

    monkeypatch.setattr("switokd.training.warm_up.compile_ahead", counted)
    small = [f"networks.{name}.model=tests.sleepers:Flat" for name in ("teacher", "student")]
    found = measured(load("digits-1t1s", [*small, "compute.compile=true"]), (4, 8, 16))
    assert found.sizes == (4, 16)
    assert compiled == [4, 16] * 2
    assert found.compile
    assert found.networks["student"].activation_bytes_per_sample > 0


def test_sizes_that_take_too_long_are_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("switokd.planning.profiler.MAX_STEP_SECONDS", 0.15)
    found = measured(load("digits-2t1s", SLEEPERS), (2, 4, 400))
    one = found.networks["teacher1"]
    assert one.samples[-1] < 400


def test_slow_steps_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switokd.planning.profiler.SLOW_SECONDS", 0.0)
    found = measured(load("digits-2t1s", SLEEPERS), (2, 4))
    assert found.networks["teacher1"].forward_seconds[1] >= 0.008


def test_decisions_cost_nothing_without_a_coordinator() -> None:
    found = measured(
        load("digits-2t1s", [*SLEEPERS, "placement=replicated", "coordinator=off"]), (2,)
    )
    assert found.communication.decision_seconds == 0


def test_a_network_that_does_not_fit_the_images_is_an_error_of_one_line() -> None:
    config = load("digits-2t1s", ["networks.student.model_kwargs={nope: 1}"])
    with pytest.raises(UsageError, match="model wrn-10-1 cannot be made"):
        measured(config)


def test_networks_with_cuda_graphs_are_measured_with_cuda_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The memory for backward is the same as without CUDA graphs."""
    captured: list[int] = []
    replayed: list[int] = []
    monkeypatch.setattr("switokd.training.build.can_capture", lambda device: True)

    def counted(compute: Any, parameters: Any, x: Tensor, capture: Any) -> Any:
        captured.append(len(x))

        def replay(x: Tensor) -> Any:
            replayed.append(len(x))
            return compute(x)

        return replay

    monkeypatch.setattr("switokd.training.cuda_graphs.GraphedModel", counted)
    monkeypatch.setattr("switokd.training.cuda_graphs.GraphCapture", Rerun)
    small = [f"networks.{name}.model=tests.sleepers:Flat" for name in ("teacher", "student")]
    found = measured(load("digits-1t1s", [*small, "compute.cuda_graphs=true"]), (4, 8))
    assert captured == [4, 8] * 2
    assert min(replayed.count(4), replayed.count(8)) >= 2 * MIN_REPETITIONS
    assert all(network.cuda_graphs for network in found.networks.values())
    captured.clear()
    config = load("digits-1t1s", small)  # default: only for networks of switokd
    eager = measured(config, (4, 8))
    assert not captured
    for name, network in eager.networks.items():
        kept = network.activation_bytes_per_sample
        assert found.networks[name].activation_bytes_per_sample == kept > 0
    with pytest.raises(UsageError, match=r"teacher was profiled with CUDA graphs, and the run "):
        found.check(config.networks)
