"""Every strategy on random logits: peers, decisions and losses, compared with `reference.py`.

Where both do the same operations in the same order, results must be bit-identical. KDCL's weights
come from different solvers and must agree to 1e-6.

Not covered: whole runs (`test_oracle`); a user's own strategy (`test_own_strategy`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from switokd.distillation.couplings import Coupling, Couplings, Term
from switokd.distillation.decision import Decision, Mode, decide
from switokd.distillation.distances import as_parts, means, pair_sums
from switokd.distillation.losses import objective
from switokd.distillation.method import Method
from switokd.distillation.strategies import STRATEGIES, make_strategy
from switokd.distillation.strategies.base import Strategy
from switokd.distillation.strategies.kdcl import General, Linear
from switokd.distillation.topology import Pair, Role, Topology
from switokd.errors import UsageError
from tests import reference

T, S = Role.TEACHER, Role.STUDENT
TOPOLOGIES = {
    "1T1S": Topology((("t", T), ("s", S))),
    "2T1S": Topology((("t1", T), ("s", S), ("t2", T))),
    "1T2S": Topology((("s1", S), ("t", T), ("s2", S))),
    "2T2S": Topology((("t1", T), ("t2", T), ("s1", S), ("s2", S))),
    "3T2S": Topology((("s1", S), ("t1", T), ("t2", T), ("s2", S), ("t3", T))),
}
KWARGS: Mapping[str, Mapping[str, float]] = {"threshold": {"delta": 0.75}}
KINDS = ["random", "confident", "by hand"]
TAU, ALPHA, BETA = 0.5, 0.25, 2.0  # powers of two: no rounding

Recorded = tuple[dict[str, Tensor], Tensor]


def recorded(topology: Topology, seed: int, kind: str = "random", soft: bool = False) -> Recorded:
    """Logits of every network, and labels or target distributions."""
    g = torch.Generator().manual_seed(seed)
    batch, classes = (3, 4) if kind == "by hand" else (16, 10)
    y = torch.randint(classes, (batch,), generator=g)
    z = {}
    for i, name in enumerate(topology):
        z[name] = torch.randn(batch, classes, generator=g)
        if kind == "confident":  # later networks are more confident
            z[name] = z[name] * 3
            z[name][torch.arange(batch), y] += 2.0 * i
        if kind == "by hand":  # few different values, so that some are equal
            z[name] = torch.randint(-2, 3, (batch, classes), generator=g).float()
    if soft:
        other = torch.randint(classes, (batch,), generator=g)
        return z, 0.7 * F.one_hot(y, classes).float() + 0.3 * F.one_hot(other, classes).float()
    return z, y


def decided(method: Method, z: Mapping[str, Tensor], y: Tensor) -> Decision:
    """The coordinator's decision for the whole batch, with one rank per teacher."""
    pairs = method.topology.pairs
    shards = {pair.teacher: [slice(0, len(y))] for pair in pairs}
    sums = pair_sums(pairs, z, y, shards, method.taus)
    return decide(1, means(as_parts(pairs, shards, sums.tolist())), method.rule)


def both(strategy: str, topology: Topology) -> tuple[Method, reference.Setup]:
    """Our method and the oracle's, with the same settings."""
    by_network = {
        name: Coupling(ALPHA if topology.role(name) is S else BETA, TAU) for name in topology
    }
    kwargs = KWARGS.get(strategy, {})
    roles = {name: topology.role(name).value for name in topology}
    setup = reference.Setup(
        roles, strategy, TAU, ALPHA, BETA, fixed_delta=kwargs.get("delta", math.nan)
    )
    return Method(Couplings(topology, by_network), make_strategy(strategy, kwargs)), setup


def losses_of_both(
    strategy: str, topology: Topology, z: Mapping[str, Tensor], y: Tensor
) -> list[tuple[str, Tensor, Tensor]]:
    """(network, our loss, the oracle's loss) of each learning network; compares decisions too."""
    method, setup = both(strategy, topology)
    decision = decided(method, z, y)
    oracles = reference.decide(setup, z, y)
    for pair in decision.pairs:
        expected = oracles[pair.pair.teacher, pair.pair.student]
        d = pair.distances
        ours = (d.gap, d.e_s, d.e_t, pair.epsilon, pair.delta)
        assert ours == pytest.approx(
            [expected[key] for key in ("gap", "e_s", "e_t", "epsilon", "delta")], abs=1e-6
        )
        assert pair.mode.value == expected["mode"]
    learning = {pair for pair, numbers in oracles.items() if numbers["mode"] == "learning"}
    oracle_logits = dict(z)
    if strategy.startswith("kdcl"):
        oracle_logits[reference.COMBINED] = reference.combined(strategy, z, y)
    peers = {**z, **method.strategy.combine(z, y)}
    pairs = []
    for name in topology:
        if name in decision.paused:
            assert not any((name, s) in learning for s in topology.students)
            continue
        known = decision if topology.role(name) is T else None  # students do not wait for it
        ours_ = objective(z[name], y, peers, method.terms(name, known))
        pairs.append((name, ours_, reference._loss(setup, name, oracle_logits, y, learning)))
    return pairs


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    "strategy",
    ["switokd", "threshold", "vanilla", "dml", "kd", "kdcl-naive", "kdcl-minlogit"],
)
def test_losses_equal_the_oracle_bit_for_bit(
    strategy: str, topology: str, kind: str, soft: bool
) -> None:
    for seed in range(2):
        z, y = recorded(TOPOLOGIES[topology], seed, kind, soft)
        for name, ours, oracles in losses_of_both(strategy, TOPOLOGIES[topology], z, y):
            assert torch.equal(ours, oracles), (seed, name)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("kind", ["random", "confident"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_losses_of_the_linear_combination_are_close_to_the_oracle(
    topology: str, kind: str, soft: bool
) -> None:
    for seed in range(2):
        z, y = recorded(TOPOLOGIES[topology], seed, kind, soft)
        for name, ours, oracles in losses_of_both("kdcl-linear", TOPOLOGIES[topology], z, y):
            assert ours.item() == pytest.approx(oracles.item(), rel=1e-5), (seed, name)


def test_the_recorded_logits_hold_both_modes_and_a_pause() -> None:
    """Without both, the comparisons above would prove little."""
    for strategy in ("switokd", "threshold"):
        modes, paused = set(), 0
        for kind in KINDS:
            for topology in TOPOLOGIES.values():
                method, _ = both(strategy, topology)
                decision = decided(method, *recorded(topology, 0, kind))
                modes |= {pair.mode for pair in decision.pairs}
                paused += len(decision.paused)
        assert modes == set(Mode)
        assert paused > 0


def ce(z: Tensor, y: Tensor) -> float:
    return F.cross_entropy(z.double(), y if y.ndim == 1 else y.double()).item()


def stacked(z: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(z.values())).double()


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0, 30.0])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("seed", range(6))
def test_linear_weights_have_the_least_cross_entropy(seed: int, soft: bool, scale: float) -> None:
    topology = list(TOPOLOGIES.values())[seed % len(TOPOLOGIES)]
    logits, y = recorded(topology, seed, KINDS[seed % 2], soft)
    z = {name: scale * z_i for name, z_i in logits.items()}
    ours = Linear().weights(stacked(z), y)
    assert ours.min() >= 0
    assert ours.sum().item() == pytest.approx(1.0)
    oracles = torch.tensor(reference.linear_weights(list(z.values()), y), dtype=torch.float64)
    least, found = (ce(torch.einsum("m,mbc->bc", w, stacked(z)), y) for w in (oracles, ours))
    assert found == pytest.approx(least, abs=1e-6)
    assert found <= min(ce(z_i, y) for z_i in z.values()) + 1e-6


def test_linear_weights_of_one_best_and_of_equal_networks() -> None:
    y = torch.tensor([0, 1, 2])
    right = 4.0 * torch.eye(3)
    weights = Linear().weights(torch.stack([-right, right, 0 * right]).double(), y)
    assert weights.tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    same = Linear().weights(torch.stack([right, right]).double(), y)
    assert same.tolist() == pytest.approx([0.5, 0.5])


def test_naive_takes_each_samples_best_network() -> None:
    y = torch.tensor([0, 1])
    a = torch.tensor([[2.0, 0, 0], [2.0, 0, 0]])
    b = torch.tensor([[0, 0, 2.0], [0, 1.0, 0]])
    (found,) = make_strategy("kdcl-naive").combine({"a": a, "b": b}, y).values()
    assert torch.equal(found, torch.stack([a[0], b[1]]))


@pytest.mark.parametrize("seed", range(5))
def test_minlogit_by_hand_and_never_worse_than_any_network(seed: int) -> None:
    a, b = torch.tensor([[3.0, 1.0, 5.0]]), torch.tensor([[-1.0, 0.0, 2.0]])
    strategy = make_strategy("kdcl-minlogit")
    (found,) = strategy.combine({"a": a, "b": b}, torch.tensor([1])).values()
    assert found.tolist() == [[-1.0, 0.0, 2.0]]  # of (2, 0, 4) and (-1, 0, 2)
    z, y = recorded(TOPOLOGIES["3T2S"], seed)
    (combined,) = strategy.combine(z, y).values()
    assert ce(combined, y) <= min(ce(z_i, y) for z_i in z.values())


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("seed", range(6))
def test_general_weights_are_the_formulas(seed: int, soft: bool) -> None:
    topology = list(TOPOLOGIES.values())[seed % len(TOPOLOGIES)]
    held_out, y = recorded(topology, seed, KINDS[seed % 2], soft)
    strategy = General()
    z, labels = recorded(topology, seed + 100)
    (before,) = strategy.combine(z, labels).values()
    torch.testing.assert_close(before.double(), stacked(z).mean(dim=0), atol=1e-6, rtol=0)
    strategy.observe(held_out, y)
    weights = reference.general_weights(list(held_out.values()), y)
    assert strategy.weights is not None
    # The code adds 1e-6 of the mean variance to the covariance's diagonal.
    assert strategy.weights.tolist() == pytest.approx(weights, abs=2e-4)
    assert sum(weights) == pytest.approx(1.0)
    (after,) = strategy.combine(z, labels).values()
    expected = reference.weighted(list(z.values()), weights)
    torch.testing.assert_close(after.double(), expected, atol=2e-3, rtol=0)


def test_general_weights_by_hand_and_of_networks_with_equal_errors() -> None:
    # The two error vectors are orthogonal, with squared lengths 1 : 4.
    y = torch.full((2, 4), 0.25)
    p = torch.tensor([[0.30, 0.20, 0.25, 0.25], [0.25, 0.25, 0.35, 0.15]])
    strategy = General()
    strategy.observe({"a": p[:1].log().expand(2, -1), "b": p[1:].log().expand(2, -1)}, y)
    assert strategy.weights is not None
    assert strategy.weights.tolist() == pytest.approx([0.8, 0.2], abs=1e-5)
    same = p.log()
    strategy.observe({"a": same, "b": same, "c": same}, y)
    assert strategy.weights.tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_pair_that_is_off_has_no_term_either_way(strategy: str) -> None:
    topology = Topology(TOPOLOGIES["2T2S"].roles, frozenset({Pair("t1", "s1")}))
    method = Method(Couplings(topology), make_strategy(strategy, KWARGS.get(strategy)))
    z, y = recorded(topology, 0, "confident")
    decision = decided(method, z, y)
    assert [p.pair for p in decision.pairs] == [
        Pair("t1", "s2"),
        Pair("t2", "s1"),
        Pair("t2", "s2"),
    ]
    for name, other in (("t1", "s1"), ("s1", "t1")):
        known = decision if name == "t1" else None
        assert other not in {term.peer for term in method.terms(name, known)}


def test_a_pair_that_is_off_does_not_keep_its_teacher_from_pausing() -> None:
    for off, paused in (([], ()), ([Pair("t", "s1")], ("t",))):
        topology = Topology(TOPOLOGIES["1T2S"].roles, frozenset(off))
        method = Method(Couplings(topology), make_strategy("switokd"))
        ahead, behind = torch.tensor([[[0.6, 0.39, 0.01]], [[0.3, 0.01, 0.69]]]).log()
        z = {"t": ahead, "s1": ahead, "s2": behind}  # the teacher is far ahead of s2 only
        assert decided(method, z, torch.tensor([0])).paused == paused


def test_kd_students_learn_from_frozen_teachers_only() -> None:
    strategy, couplings = make_strategy("kd"), Couplings(TOPOLOGIES["3T2S"])
    assert strategy.frozen_teachers
    assert strategy.terms("t1", couplings, None) == []
    assert strategy.terms("s1", couplings, None) == [Term(t, 1.0, 1.0) for t in ("t1", "t2", "t3")]
    method = Method(couplings, strategy)
    assert decided(method, *recorded(couplings.topology, 0)).paused == ("t1", "t2", "t3")


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("switokt", {}, "did you mean 'switokd'?"),
        ("kdcl", {}, "is not one of switokd, vanilla, dml, kd, threshold, kdcl-naive,"),
        ("threshold", {}, "missing 1 required positional argument: 'delta'"),
        ("threshold", {"delta": 3}, "delta is an L1 distance, from 0 to 2, got 3"),
        ("threshold", {"delta": math.nan}, "delta is an L1 distance, from 0 to 2, got nan"),
        ("threshold", {"delta": True}, "delta is an L1 distance, from 0 to 2, got True"),
        ("threshold", {"delta": "0.5"}, "delta is an L1 distance, from 0 to 2, got '0.5'"),
        ("switokd", {"delta": 0.5}, "cannot be created with strategy_kwargs {'delta': 0.5}"),
        (
            "kdcl-general",
            {"held_out": 1},
            "held_out must be an integer, 2 images or more, got 1",
        ),
        (
            "collections:Counter",
            {},
            "must be a switokd.distillation.strategies.Strategy, got Counter",
        ),
        ("no_such_module:Strategy", {}, "there is no module 'no_such_module'"),
    ],
)
def test_a_wrong_strategy_is_a_usage_error(
    name: str, kwargs: Mapping[str, float], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make_strategy(name, kwargs)
    assert words in str(caught.value)


def test_an_import_string_is_imported_only_where_it_is_allowed() -> None:
    own = "switokd.distillation.strategies:Strategy"
    assert type(make_strategy(own)) is Strategy
    assert type(make_strategy(own, allowed=[own])) is Strategy
    with pytest.raises(UsageError, match="is not one of switokd"):
        make_strategy(own, allowed=[])
