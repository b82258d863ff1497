"""The benchmark runs, and its plain loop agrees with the oracle.

Not covered: the values of the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import (
    against,
    devices,
    in_process,
    plain,
    planning,
    profiling,
    roofline,
    runs,
    simulated,
)
from bench.__main__ import PARTS, chosen
from bench.figures import Figure
from bench.runs import BATCH, CLASSES
from switokd.config.config import Config
from switokd.models.flops import size_of
from switokd.planning.cost_model import predict
from switokd.planning.pauses import Pauses
from switokd.planning.profile import GLOO_LOOPBACK, NetworkTimes, Profile
from switokd.runtime.environment import cores
from switokd.runtime.placement import replicated
from tests import reference

TOPOLOGIES = {
    "1T1S": {"t": "teacher", "s": "student"},
    "2T1S": {"t1": "teacher", "t2": "teacher", "s": "student"},
    "1T2S": {"t": "teacher", "s1": "student", "s2": "student"},
}


def network(name: str, classes: int = 4) -> nn.Module:
    """A small network whose initial weights depend on its name."""
    torch.manual_seed(len(name) + ord(name[0]) + ord(name[-1]))
    features = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU())
    return nn.Sequential(features, nn.Linear(16, classes))


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    all_batches = []
    for _ in range(steps):
        y = torch.randint(4, (16,), generator=generator)
        x = torch.randn(16, 3, 2, 2, generator=generator)
        x[torch.arange(16), y % 3] += 3
        x[:, 0, 0, 0] += 3 * (y == 3)
        all_batches.append((x, y))
    return all_batches


@pytest.mark.parametrize("strategy", ["switokd", "dml"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_plain_loop_agrees_with_the_oracle(topology: str, strategy: str) -> None:
    roles = TOPOLOGIES[topology]
    # With two students the plain loop follows the published code. dml is the same in both.
    as_published = topology == "1T2S" and strategy == "switokd"
    semantics = "published" if as_published else "paper"
    setup = reference.Setup(dict(roles), strategy, semantics=semantics)
    networks, oracles = ({name: network(name) for name in roles} for _ in range(2))
    lr = {name: 1.0 if role == "teacher" else 0.1 for name, role in roles.items()}
    optimizers = [
        {name: torch.optim.SGD(n.parameters(), lr[name], 0.5) for name, n in side.items()}
        for side in (networks, oracles)
    ]

    trace = plain.train(roles, networks, optimizers[0], batches(60), dml=strategy == "dml")
    decisions = reference.train(setup, oracles, optimizers[1], batches(60))

    modes: dict[tuple[int, str], set[str]] = {}
    for d in decisions:
        modes.setdefault((d["step"], d["teacher"]), set()).add(d["mode"])
    paused = [(step, t) for (step, t), of_pairs in modes.items() if of_pairs == {"expert"}]
    assert [(i, t) for i, names in enumerate(trace.experts, 1) for t in names] == paused
    assert bool(paused) == (strategy == "switokd")
    assert len(paused) < len(modes)
    for name in roles:
        for a, b in zip(networks[name].parameters(), oracles[name].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_figure_is_the_median_of_its_rounds() -> None:
    figure = Figure.of_pairs("f", [(2.0, 1.0), (9.0, 3.0), (8.0, 2.0)], target=3.0)
    assert figure.rounds == (2.0, 3.0, 4.0)
    assert figure.value == 3.0
    assert figure.reached is True
    assert Figure("f", (3.1,), target=3.0, at_least=False).reached is False
    assert Figure("f", (3.1,)).reached is None


def test_parts_are_chosen_by_their_names_or_their_figures() -> None:
    assert chosen("plan_error,paused") == ["paused", "simulated"]
    for part, module in PARTS.items():
        assert chosen(part) == [part]
        assert all(chosen(name) == [part] for name in module.FIGURES)
    assert chosen("") == list(PARTS)
    words = (
        r"--only plain_fp33: allowed are plain, .*, nccl, or a figure; did you mean 'plain_fp32'\?"
    )
    with pytest.raises(ValueError, match=words):
        chosen("plain_fp33")


def profile_of(networks: Mapping[str, tuple[Any, str]]) -> Profile:
    """A profile of networks by name, each as (role, model)."""

    def times(role: Any, model: str) -> NetworkTimes:
        return NetworkTimes(
            role=role,
            model=model,
            samples=(8, 64),
            forward_seconds=(0.01, 0.07),
            backward_seconds=(0.03, 0.2),
            update_seconds=0.002,
            parameter_bytes=4000,
            gradient_bytes=4000,
            optimizer_bytes=0,
            activation_bytes_per_sample=0,
        )

    return Profile(
        device="cpu",
        threads=1,
        torch="any",
        image=(1, 8, 8),
        classes=10,
        networks={name: times(*network) for name, network in networks.items()},
        communication=GLOO_LOOPBACK,
    )


def test_slowed_time_slows_the_whole_prediction() -> None:
    config = Config.model_validate(devices.Devices().run_file(64))
    profiled = profile_of({name: (n.role, n.model) for name, n in config.networks.items()})
    placement = replicated(config.topology, 4)
    once, thrice = (
        predict(p, placement, 64, Pauses.none()).step_seconds
        for p in (profiled, devices.slowed(profiled, 3))
    )
    assert thrice == pytest.approx(3 * once)


def test_links_measured_in_slowed_time_are_not_slowed_again() -> None:
    measured = GLOO_LOOPBACK.model_copy(update={"latency_seconds": 7.0})
    profiled = profile_of({"s": ("student", "any")})
    links = devices.slowed(profiled, 3, measured).communication
    assert links.latency_seconds == 7.0
    assert links.bandwidth_bytes_per_second == GLOO_LOOPBACK.bandwidth_bytes_per_second
    assert links.decision_seconds == 3 * GLOO_LOOPBACK.decision_seconds


def test_links_are_measured_between_ranks() -> None:
    links = devices.links_between(2)
    assert "2 ranks, measured" in links.description
    assert links.latency_seconds > 0


def test_simulated_networks_have_gradients_as_large_as_real_ones() -> None:
    network = simulated.SimulatedNetwork(0.0, 0.0, parameters=1000)
    network(torch.zeros(2, 3, 4, 4)).sum().backward()
    sizes = [p.grad.numel() for p in network.layers if p.grad is not None]
    assert len(sizes) == simulated.LAYERS
    assert sum(sizes) == pytest.approx(1000, abs=simulated.LAYERS)
    assert devices.parameters()["wrn-16-10"] == pytest.approx(17.1e6, rel=0.01)


@pytest.mark.parametrize(
    "network", ["wrn-16-2", "mobilenet-0.5"]
)  # MobileNet has grouped convolutions
def test_convolutions_alone_count_their_operations(network: str) -> None:
    alone = roofline.Convolutions.of(network)
    alone.run()
    forward = size_of(network, (3, 32, 32), CLASSES).multiply_adds
    assert alone.operations / (3 * 2 * BATCH) == pytest.approx(forward, rel=0.05)
    assert size_of("wrn-16-2", (3, 32, 32), CLASSES).multiply_adds == pytest.approx(1e8, rel=0.05)
    assert alone.bytes_made % (4 * BATCH) == 0


def test_the_matrix_of_comparisons_is_complete() -> None:
    cases = {case.figure: case for case in against.cases()}
    for kind in ("plain", "unequal"):
        for precision in ("fp32", "bf16"):
            for topology in ("1T1S", "2T1S", "1T2S"):
                suffix = "" if topology == "2T1S" else f"_{topology.lower()}"
                case = cases[f"{kind}_{precision}{suffix}"]
                config = in_process.configured(case.run_file(3))
                assert config.topology.name == topology
                assert case.precision == precision
                assert case.searched == (topology == "2T1S")
                models = {model for _, model in case.networks.values()}
                assert len(models) == (1 if kind == "plain" else len(case.networks))
                assert config.method.rule.pauses == (topology != "1T2S"), "as published"
    assert in_process.configured(cases["plain_fp32_1t2s_paper"].run_file(3)).method.rule.pauses
    assert set(cases) >= set(against.TARGETS)


def test_candidates_near_the_fastest_are_tried_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        "one process": 1.0,
        "a rank per network": 1.3,
        "two ranks, the largest alone": 1.2,
        "replicated, a rank per core": 1.25,
        "one process, compiled": 0.9,
        "two ranks, the largest alone, compiled": 0.7,
        "replicated, a rank per core, compiled": 0.8,
    }

    asked: list[str] = []

    def ours(self: against.Case, candidate: against.Candidate, steps: int) -> SimpleNamespace:
        asked.append(str(candidate))
        busy = 9.0 * (len(asked) in (3, 6))  # another process used the machine for a moment
        return SimpleNamespace(step_seconds=seconds[str(candidate)] + busy)

    monkeypatch.setattr(against.Case, "ours", ours)
    cases = {case.figure: case for case in against.cases()}
    tried: dict[str, float] = {}
    best = against.fastest(cases["unequal_fp32"], 3, tried, lambda text: None)
    assert tried == seconds
    assert asked == [*list(seconds)[:4]] * 2 + [*list(seconds)[4:]] * 2
    assert str(best) == "two ranks, the largest alone, compiled"
    like = cases["unequal_fp32_1t2s"].like(best)
    assert (like.name, like.compiled, like.processes) == (best.name, True, 2)
    assert like.settings == {"placement": {"t1": [0], "s1": [1], "s2": [1]}}


def test_every_case_uses_a_configuration_of_its_own_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: dict[str, against.Candidate] = {}

    def fastest(case: against.Case, *more: object) -> against.Candidate:
        return replace(case.candidates[-1], compiled=case.precision == "bf16")

    def compare(case: against.Case, best: against.Candidate, *more: object) -> Figure:
        assert best.name in [candidate.name for candidate in case.candidates]
        used[case.figure] = best
        return Figure(case.figure, (1.0,))

    monkeypatch.setattr(against, "fastest", fastest)
    monkeypatch.setattr(against, "compare", compare)
    names = tuple(figure.name for figure in against.measure(False, lambda text: None))
    assert names == against.FIGURES
    assert used["plain_bf16_1t1s"].processes == 2, "a rank per network"
    for name, candidate in used.items():
        assert candidate.compiled == ("bf16" in name)
        assert candidate.name.startswith("replicated" if "unequal" in name else "a rank per")


@pytest.mark.timeout(200)
def test_ranks_are_profiled_at_the_same_time() -> None:
    networks = {"t": ("teacher", "wrn-10-1"), "s": ("student", "wrn-10-1")}
    profiled = planning.profile_as_ranks(in_process.configured(runs.run_file(networks, 1, 8)), 2)
    assert profiled.threads == max(cores() // 2, 1)
    assert profiled.sizes == (4, 8)
    assert profiled.communication.description == "gloo between 2 ranks, measured"


def test_pauses_are_those_of_the_steps() -> None:
    none, first, both = frozenset[str](), frozenset({"t1"}), frozenset({"t1", "t2"})
    pauses = planning.pauses_of([none, first, both, none])
    assert dict(pauses.patterns) == {none: 0.5, first: 0.25, both: 0.25}
    assert (pauses.share("t1"), pauses.share("t2")) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["aten::empty", "aten::mkldnn_convolution", "aten::conv2d"], "convolutions"),
        (["aten::convolution_backward", "ConvolutionBackward0"], "convolutions"),
        (["aten::native_batch_norm", "aten::batch_norm"], "normalisation"),
        (
            ["graph_0_cpp_fused_add_convolution_backward_relu_3", "CompiledFunction"],
            "normalisation",
        ),
        (["graph_0_cpp_fused_convolution_0", "CompiledFunction"], "rest"),
        (["aten::add_"], "normalisation"),
        (["aten::add_", "torch::autograd::AccumulateGrad"], "rest"),
        (["aten::add_", "Optimizer.step#SGD.step"], "rest"),
        (["aten::addmm", "aten::linear"], "rest"),
    ],
)
def test_kinds_of_operations(names: list[str], kind: str) -> None:
    assert profiling.kind_of(names) == kind
