"""`semantics: published`, on logits for which its decision differs from the paper's.

Both semantics are compared with the oracle: `reference.decide` implements the two slips of the
released code and its 1T2S without pauses.

Not covered: whole runs (`test_oracle`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from switokd.config.config import Config
from switokd.config.run_file import load
from switokd.distillation.couplings import Couplings
from switokd.distillation.decision import (
    Decision,
    Mode,
    decide,
    unsafe_pairs,
)
from switokd.distillation.distances import as_parts, means, pair_sums
from switokd.distillation.gap import Distances, epsilon
from switokd.distillation.method import Method
from switokd.distillation.semantics import epsilon_from, pauses_by_zero, problem_of_semantics
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role, Topology
from switokd.errors import UsageError
from tests import reference

T, S = Role.TEACHER, Role.STUDENT
ONE_ONE = Topology((("t", T), ("s", S)))
# The first teacher or student is the one that comes first in the run file.
TWO_ONE = Topology((("s", S), ("tb", T), ("ta", T)))
ONE_TWO = Topology((("sb", S), ("t", T), ("sa", S)))
SLIPS = {"2T1S": (Pair("ta", "s"), Pair("tb", "s")), "1T2S": (Pair("t", "sb"), Pair("t", "sa"))}
"""(pair whose epsilon comes from another pair, that other pair) by topology."""
TOPOLOGIES = {"2T1S": TWO_ONE, "1T2S": ONE_TWO}

Recorded = tuple[dict[str, Tensor], Tensor]


def recorded(topology: Topology, seed: int) -> Recorded:
    """Logits of networks of different accuracy, and the labels."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(5, (6,), generator=g)
    z = {name: torch.randn(6, 5, generator=g) for name in topology}
    for name in topology:
        z[name][torch.arange(6), y] += 5 * torch.rand((), generator=g)
    return z, y


def decided(semantics: str, topology: Topology, z: dict[str, Tensor], y: Tensor) -> Decision:
    method = Method(Couplings(topology), make_strategy("switokd"), semantics)
    shards = {teacher: [slice(0, len(y))] for teacher in topology.teachers}
    sums = pair_sums(topology.pairs, z, y, shards, method.taus)
    return decide(1, means(as_parts(topology.pairs, shards, sums.tolist())), method.rule)


def oracles(semantics: str, topology: Topology) -> reference.Setup:
    roles = {name: topology.role(name).value for name in topology}
    return reference.Setup(roles, "switokd", semantics=semantics)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_both_semantics_decide_like_the_oracle(name: str) -> None:
    topology, (slipped, epsilon_pair) = TOPOLOGIES[name], SLIPS[name]
    differ = 0
    for seed in range(100):
        z, y = recorded(topology, seed)
        modes = {}
        for semantics in ("paper", "published"):
            decision = decided(semantics, topology, z, y)
            expected = reference.decide(oracles(semantics, topology), z, y)
            assert [(p.pair.teacher, p.pair.student) for p in decision.pairs] == list(expected)
            for pair, numbers in zip(decision.pairs, expected.values(), strict=True):
                assert pair.mode.value == numbers["mode"]
                found = (pair.epsilon, pair.delta)
                assert found == pytest.approx((numbers["epsilon"], numbers["delta"]), abs=1e-6)
            modes[semantics] = {pair: decision.mode(pair) for pair in topology.pairs}
        assert modes["paper"][epsilon_pair] is modes["published"][epsilon_pair]
        differ += modes["paper"][slipped] is not modes["published"][slipped]
    assert differ >= 10


def test_2t1s_by_hand() -> None:
    # Teacher 2's own epsilon is exp(-0.8 / 2) = 0.6703, teacher 1's exp(-0.2 / 1.4) = 0.8669.
    one, two = Distances(1.1, 1.2, 0.2, 8), Distances(0.6, 1.2, 0.8, 8)
    pairs = dict(zip(TWO_ONE.pairs, (one, two), strict=True))
    found = {}
    for semantics in ("paper", "published"):
        rule = Method(Couplings(TWO_ONE), make_strategy("switokd"), semantics).rule
        found[semantics] = decide(1, pairs, rule)
    deltas = {name: [p.delta for p in decision.pairs] for name, decision in found.items()}
    assert deltas["paper"] == pytest.approx([1.0266, 0.6637], abs=1e-4)
    assert deltas["published"] == pytest.approx([1.0266, 0.5065], abs=1e-4)
    assert found["paper"].paused == ("tb",)
    assert found["published"].paused == ("tb", "ta")


def test_1t2s_by_hand() -> None:
    # Student 1's own epsilon is exp(-0.8 / 2) = 0.6703, student 2's exp(-0.8 / 1.8) = 0.6412.
    one, two = Distances(0.68, 1.2, 0.8, 8), Distances(0.3, 1.0, 0.8, 8)
    pairs = dict(zip(ONE_TWO.pairs, (one, two), strict=True))
    modes = {}
    for semantics in ("paper", "published"):
        rule = Method(Couplings(ONE_TWO), make_strategy("switokd"), semantics).rule
        modes[semantics] = [p.mode for p in decide(1, pairs, rule).pairs]
    assert modes["paper"] == [Mode.EXPERT, Mode.LEARNING]  # delta 0.664
    assert modes["published"] == [Mode.LEARNING, Mode.LEARNING]  # delta 0.687


def test_rounding_of_the_pair_that_epsilon_comes_from_counts_too() -> None:
    slipped, epsilon_pair = SLIPS["2T1S"]
    rule = Method(Couplings(TWO_ONE), make_strategy("switokd"), "published").rule
    far, near = Distances(1.9, 1.2, 0.2, 8), Distances(0.1, 1.2, 0.8, 8)
    with pytest.raises(KeyError):
        decide(1, {slipped: far}, rule)
    both = {epsilon_pair: near, slipped: far}
    assert not unsafe_pairs(decide(1, both, rule), both, rule)
    at = rule.delta(far, epsilon(near))
    both[slipped] = replace(far, gap=at)
    assert unsafe_pairs(decide(1, both, rule), both, rule) == (slipped,)


def test_only_the_published_1t2s_multiplies_the_loss_by_0() -> None:
    published = {t.name: pauses_by_zero("published", t) for t in (ONE_ONE, TWO_ONE, ONE_TWO)}
    assert published == {"1T1S": False, "2T1S": False, "1T2S": True}
    assert not pauses_by_zero("paper", ONE_TWO)


def test_semantics_of_one_pair_are_the_same() -> None:
    assert problem_of_semantics("published", ONE_ONE) == ""
    assert epsilon_from("published", ONE_ONE) == {}


def many(folder: Path, *settings: str) -> Config:
    path = folder / "many.yaml"
    path.write_text("name: many\nteacher: {model: wrn-10-1}\nstudent: {model: wrn-10-1}\n")
    return load(str(path), settings)


@pytest.mark.parametrize(
    "settings",
    [
        ["topology=2T2S"],
        ["topology=3T1S"],
        ["topology=1T3S"],
        ["topology=2T2S", "pairs.teacher1.student1={enabled: false}"],
    ],
)
def test_published_is_refused_for_other_topologies(settings: list[str], tmp_path: Path) -> None:
    many(tmp_path, *settings)
    with pytest.raises(UsageError) as caught:
        many(tmp_path, *settings, "distillation.semantics=published")
    sentence = str(caught.value)
    assert "semantics published exists only for 1T1S, 2T1S, 1T2S with all pairs on" in sentence
    assert f"this run is {settings[0].removeprefix('topology=')}" in sentence
    assert "\n" not in sentence


def test_published_is_allowed_for_its_topologies_and_other_names_are_refused(
    tmp_path: Path,
) -> None:
    for topology in ("1T1S", "2T1S", "1T2S"):
        config = many(tmp_path, f"topology={topology}", "distillation.semantics=published")
        assert config.method.semantics == "published"
    with pytest.raises(UsageError, match="semantics: one of paper, published"):
        many(tmp_path, "topology=1T1S", "distillation.semantics=rumoured")


@pytest.mark.parametrize("strategy", ["vanilla", "dml", "kd", "kdcl-naive", "kdcl-general"])
def test_published_needs_a_strategy_that_switches(strategy: str, tmp_path: Path) -> None:
    settings = ["topology=1T2S", "teacher.weights=t.pt", f"distillation.strategy={strategy}"]
    many(tmp_path, *settings)
    with pytest.raises(UsageError, match="only for the strategies switokd and threshold") as found:
        many(tmp_path, *settings, "distillation.semantics=published")
    assert "\n" not in str(found.value)
    delta = "distillation={strategy: threshold, strategy_kwargs: {delta: 1}, semantics: published}"
    assert many(tmp_path, "topology=1T2S", delta).method.semantics == "published"


def test_published_needs_an_own_strategy_to_inherit_from_switokd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_semantics.py").write_text(
        "from switokd.distillation.strategies import Strategy\n"
        "from switokd.distillation.strategies.switching import SwitOKD\n"
        "class Other(Strategy): pass\n"
        "class Alike(SwitOKD): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = ["topology=1T2S", "distillation.semantics=published"]
    alike = many(tmp_path, *settings, "distillation.strategy=own_semantics:Alike")
    assert alike.method.semantics == "published"
    other = many(tmp_path, *settings, "distillation.strategy=own_semantics:Other")
    with pytest.raises(UsageError, match=r"^distillation\.semantics: semantics published exists"):
        _ = other.method
