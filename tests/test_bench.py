"""The benchmark: its plain loop against the oracle, and that it runs; no figure is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import devices, plain, roofline, simulated
from bench.__main__ import chosen
from bench.figures import Figure
from bench.runs import BATCH
from switokd.config import Config
from switokd.pauses import Pauses
from switokd.placement import replicated
from switokd.plan import predict
from switokd.timings import GLOO_LOOPBACK, NetworkTimes, Profile
from tests import reference
from tests.support import REPOSITORY, run

TOPOLOGIES = {
    "1T1S": {"t": "teacher", "s": "student"},
    "2T1S": {"t1": "teacher", "t2": "teacher", "s": "student"},
    "1T2S": {"t": "teacher", "s1": "student", "s2": "student"},
}


def network(name: str, classes: int = 4) -> nn.Module:
    """A small network, its first weights given by its name."""
    torch.manual_seed(len(name) + ord(name[0]) + ord(name[-1]))
    made = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU())
    return nn.Sequential(made, nn.Linear(16, classes))


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        y = torch.randint(4, (16,), generator=generator)
        x = torch.randn(16, 3, 2, 2, generator=generator)
        x[torch.arange(16), y % 3] += 3
        x[:, 0, 0, 0] += 3 * (y == 3)
        made.append((x, y))
    return made


@pytest.mark.parametrize("strategy", ["switokd", "dml"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_plain_loop_is_the_method(topology: str, strategy: str) -> None:
    roles = TOPOLOGIES[topology]
    # As published where there are two students; dml, which never switches, is the same in both.
    as_published = topology == "1T2S" and strategy == "switokd"
    semantics = "published" if as_published else "paper"
    setup = reference.Setup(dict(roles), strategy, semantics=semantics)
    ours, theirs = ({name: network(name) for name in roles} for _ in range(2))
    lr = {name: 1.0 if role == "teacher" else 0.1 for name, role in roles.items()}
    optimizers = [
        {name: torch.optim.SGD(made.parameters(), lr[name], 0.5) for name, made in side.items()}
        for side in (ours, theirs)
    ]

    trace = plain.train(roles, ours, optimizers[0], batches(60), dml=strategy == "dml")
    records = reference.train(setup, theirs, optimizers[1], batches(60))

    modes: dict[tuple[int, str], set[str]] = {}
    for record in records:
        modes.setdefault((record["step"], record["teacher"]), set()).add(record["mode"])
    paused = [(step, t) for (step, t), found in modes.items() if found == {"expert"}]
    assert [(i, t) for i, names in enumerate(trace.experts, 1) for t in names] == paused
    assert bool(paused) == (strategy == "switokd")
    assert len(paused) < len(modes)
    for name in roles:
        for a, b in zip(ours[name].parameters(), theirs[name].parameters(), strict=True):
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
    assert len(chosen("")) > 5
    with pytest.raises(ValueError, match=r"--only nothing: one of plain, "):
        chosen("nothing")


def network_times(role: Any, model: str) -> NetworkTimes:
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


def test_slowed_time_slows_all_of_a_prediction() -> None:
    config = Config.model_validate(devices.Devices().run_file(64))
    profiled = Profile(
        device="cpu",
        threads=1,
        torch="any",
        image=(1, 8, 8),
        classes=10,
        networks={
            name: network_times(network.role, network.model)
            for name, network in config.networks.items()
        },
        communication=GLOO_LOOPBACK,
    )
    placement = replicated(config.topology, 4)
    once, thrice = (
        predict(each, placement, 64, Pauses.none()).step_seconds
        for each in (profiled, devices.slowed(profiled, 3))
    )
    assert thrice == pytest.approx(3 * once)


def test_links_that_were_measured_in_slowed_time_are_not_slowed_again() -> None:
    measured = GLOO_LOOPBACK.model_copy(update={"latency_seconds": 7.0})
    profiled = Profile(
        device="cpu",
        threads=1,
        torch="any",
        image=(1, 8, 8),
        classes=10,
        networks={"s": network_times("student", "any")},
        communication=GLOO_LOOPBACK,
    )
    links = devices.slowed(profiled, 3, measured).communication
    assert links.latency_seconds == 7.0
    assert links.bandwidth_bytes_per_second == GLOO_LOOPBACK.bandwidth_bytes_per_second
    assert links.decision_seconds == 3 * GLOO_LOOPBACK.decision_seconds


def test_links_are_measured_between_ranks() -> None:
    found = devices.links_between(2)
    assert "2 ranks, measured" in found.description
    assert found.latency_seconds > 0


def test_simulated_networks_have_gradients_as_large_as_real_ones() -> None:
    made = simulated.Waiting(0.0, 0.0, parameters=1000)
    made(torch.zeros(2, 3, 4, 4)).sum().backward()
    sizes = [p.grad.numel() for p in made.layers if p.grad is not None]
    assert len(sizes) == simulated.LAYERS
    assert sum(sizes) == pytest.approx(1000, abs=simulated.LAYERS)
    assert devices.parameters()["wrn-16-10"] == pytest.approx(17.1e6, rel=0.01)


def test_convolutions_alone_count_their_operations() -> None:
    run, operations = roofline.convolutions()
    run()
    # WRN-16-2, images of 32 x 32: some 0.1 G multiplications and additions forward.
    assert operations / (3 * 2 * BATCH) == pytest.approx(0.1e9, rel=0.05)


@pytest.mark.timeout(200)
def test_the_benchmark_runs_and_writes_its_results(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "waits", "--out", str(out)]
    code, printed, errors = run(command, REPOSITORY, seconds=180)
    assert code == 0, f"{printed}\n{errors}"
    results = json.loads(out.read_text())
    assert {"hardware", "versions", "commit", "date", "quick", "figures"} <= set(results)
    assert not results["failed"]
    for name in ("decision_wait_share", "decision_wait_over_round_trip"):
        assert {"median", "min", "max", "pairs", "target", "reached"} <= set(
            results["figures"][name]
        )
        assert name in printed
