"""Weights and temperatures of the KL terms: pair settings override network and run settings.

The expected values are computed by hand, and by the oracle from the text of the run file.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch

from switokd.config.config import Config
from switokd.config.run_file import load
from switokd.distillation.couplings import Coupling, Couplings, Term
from switokd.distillation.decision import decide
from switokd.distillation.distances import as_parts, means, pair_sums
from switokd.distillation.losses import objective
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role, Topology
from tests import reference
from tests.training.test_oracle import setup_of

RUN_FILE = """
name: own
topology: 2T2S
teacher: {model: wrn-10-1}
student: {model: wrn-10-1}
networks:
  teacher1: {temperature: 2.0, beta: 0.3}
  student2: {temperature: 5.0, alpha: 0.7}
pairs:
  teacher1:
    student1: {temperature: 3.0}
    student2: {alpha: 0.2, beta: 0.9}
  teacher2:
    student1: {enabled: false}
    student2: {alpha: 0.0}
distillation: {temperature: 4.0, alpha: 1.5, beta: 0.5}
"""
T1, T2, S1, S2 = "teacher1", "teacher2", "student1", "student2"
BY_HAND = {  # (learning network, peer): weight, temperature
    (T1, T2): (0.3, 2.0),
    (T1, S1): (0.3, 3.0),
    (T1, S2): (0.9, 2.0),
    (T2, T1): (0.5, 4.0),
    (T2, S2): (0.5, 4.0),
    (S1, S2): (1.5, 4.0),
    (S1, T1): (1.5, 3.0),
    (S2, S1): (0.7, 5.0),
    (S2, T1): (0.2, 5.0),
    (S2, T2): (0.0, 5.0),
}


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(RUN_FILE)
    return str(path)


@pytest.fixture
def config(run_file: str) -> Config:
    return load(run_file)


def test_pair_settings_override_network_and_run_settings(config: Config) -> None:
    setup = setup_of(config)
    for network, peer in permutations(config.topology, 2):
        if {network, peer} == {T2, S1}:
            assert config.couplings.is_off(network, peer)
            assert not setup.enabled(network, peer)
            continue
        coupling = config.couplings.of(network, peer)
        assert (coupling.weight, coupling.tau) == BY_HAND[network, peer]
        assert (setup.weight(network, peer), setup.setting("tau", network, peer)) == (
            coupling.weight,
            coupling.tau,
        )


def test_distances_use_the_temperature_at_which_the_student_learns(
    config: Config,
) -> None:
    assert config.method.taus == {Pair(T1, S1): 3.0, Pair(T1, S2): 5.0, Pair(T2, S2): 5.0}


def test_a_combined_teacher_has_the_networks_default_coupling(config: Config) -> None:
    couplings = {name: config.couplings.of(name, "(combined)") for name in config.topology}
    assert couplings == {
        T1: Coupling(0.3, 2.0),
        T2: Coupling(0.5, 4.0),
        S1: Coupling(1.5, 4.0),
        S2: Coupling(0.7, 5.0),
    }


@pytest.mark.parametrize("strategy", ["switokd", "dml", "vanilla"])
def test_losses_and_decisions_are_the_oracles(run_file: str, strategy: str) -> None:
    config = load(run_file, [f"distillation.strategy={strategy}"])
    setup, method, topology = setup_of(config), config.method, config.topology
    assert setup.strategy == strategy
    shards = {teacher: [slice(0, 7), slice(7, 16)] for teacher in topology.teachers}
    modes_seen = set()
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        z = {name: 4 * torch.randn(16, 6, generator=g) for name in topology}
        y = torch.randint(6, (16,), generator=g)
        for name in topology:
            z[name][torch.arange(16), y] += 12 * torch.rand((), generator=g)

        sums = pair_sums(topology.pairs, z, y, shards, method.taus)
        decision = decide(1, means(as_parts(topology.pairs, shards, sums.tolist())), method.rule)
        oracles = reference.decide(setup, z, y)
        modes = {(p.pair.teacher, p.pair.student): p.mode.value for p in decision.pairs}
        assert modes == {pair: numbers["mode"] for pair, numbers in oracles.items()}
        modes_seen |= set(modes.values())
        for p in decision.pairs:
            numbers = oracles[p.pair.teacher, p.pair.student]
            assert p.distances.gap == pytest.approx(numbers["gap"], abs=1e-6)
        learning = {pair for pair, mode in modes.items() if mode == "learning"}
        for name in topology:
            terms = method.terms(name, decision if name in topology.teachers else None)
            ours = objective(z[name], y, z, terms)
            oracle = reference._loss(setup, name, z, y, learning)
            torch.testing.assert_close(ours, oracle, rtol=1e-6, atol=0)
    assert modes_seen == ({"learning", "expert"} if strategy == "switokd" else {"learning"})


def test_dml_divides_by_the_number_of_remaining_peers() -> None:
    topology = Topology(
        (("t", Role.TEACHER), ("s1", Role.STUDENT), ("s2", Role.STUDENT)),
        frozenset({Pair("t", "s1")}),
    )
    couplings = Couplings(topology, dict.fromkeys(topology, Coupling(0.6, 2.0)))
    strategy = make_strategy("dml")
    assert strategy.terms("s1", couplings, None) == [Term("s2", 0.6, 2.0)]
    assert strategy.terms("s2", couplings, None) == [Term("t", 0.3, 2.0), Term("s1", 0.3, 2.0)]
