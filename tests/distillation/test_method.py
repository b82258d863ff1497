"""The method's formulas, compared with numbers computed by hand and with `reference.py`.

`reference.py` was written from the paper alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from switokd.distillation.couplings import Coupling, Couplings, Term
from switokd.distillation.decision import (
    ROUNDING,
    Decision,
    Mode,
    PairDecision,
    Rule,
    decide,
    unsafe_pairs,
)
from switokd.distillation.distances import as_parts, means
from switokd.distillation.distances import pair_sums as sums_of_pairs
from switokd.distillation.gap import (
    Distances,
    PairSums,
    delta,
    epsilon,
)
from switokd.distillation.losses import kl, objective
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role, Topology
from tests import reference

T, S = Role.TEACHER, Role.STUDENT
ONE_ONE = Topology((("s", S), ("t", T)))
TWO_ONE = Topology((("t1", T), ("t2", T), ("s", S)))
ONE_TWO = Topology((("t", T), ("s1", S), ("s2", S)))
TWO_TWO = Topology((("s1", S), ("t1", T), ("s2", S), ("t2", T)))

EXPERT = Distances(gap=0.8, e_s=1.2, e_t=1.0, n=1)  # delta 0.565
LEARNING = Distances(gap=0.5, e_s=1.2, e_t=1.0, n=1)

RULE = Rule(make_strategy("switokd").switch)

# One sample, three classes, label 0.
P_T, P_S, LABEL = [0.5, 0.4, 0.1], [0.4, 0.1, 0.5], torch.tensor([0])


def logits(*rows: list[float]) -> Tensor:
    """Logits with these probabilities at temperature 1, shifted by a constant."""
    return torch.tensor(rows).log() + 3


def pair_sums(z_t: Tensor, z_s: Tensor, y: Tensor, tau: float, *cuts: int) -> PairSums:
    """Sums of one pair over the whole batch, added up over shards that end at `cuts`."""
    pair, bounds = Pair("t", "s"), [0, *cuts, len(y)]
    shards = {"t": [slice(a, b) for a, b in pairwise(bounds)]}
    rows = sums_of_pairs([pair], {"t": z_t, "s": z_s}, y, shards, {pair: tau}).tolist()
    (first, *rest) = as_parts([pair], shards, rows)[pair]
    return sum(rest, first)


def mode_of(d: Distances, strategy: str = "switokd") -> Mode:
    """Mode that a strategy decides from the distances of a pair."""
    return make_strategy(strategy).switch(d, delta(d))


def couplings(topology: Topology, weight: float, tau: float = 1.0) -> Couplings:
    """The same weight and temperature for every network."""
    return Couplings(topology, dict.fromkeys(topology, Coupling(weight, tau)))


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Logits of teacher and student, labels, temperature."""
    g = torch.Generator().manual_seed(seed)
    batch, classes = int(torch.randint(1, 40, (), generator=g)), 2 + seed % 20
    z_t, z_s = (torch.randn(batch, classes, generator=g) * (1 + seed % 5) for _ in range(2))
    y = torch.randint(classes, (batch,), generator=g)
    z_t[torch.arange(batch), y] += seed % 3  # a better teacher for two of three seeds
    return z_t, z_s, y, (1.0, 2.0, 0.5)[seed % 3]


def test_distances_by_hand() -> None:
    found = pair_sums(logits(P_T), logits(P_S), LABEL, tau=1).mean()
    assert found.gap == pytest.approx(0.1 + 0.3 + 0.4, abs=1e-6)
    assert found.e_s == pytest.approx(0.6 + 0.1 + 0.5, abs=1e-6)
    assert found.e_t == pytest.approx(0.5 + 0.4 + 0.1, abs=1e-6)
    assert epsilon(found) == pytest.approx(0.634736, abs=1e-6)  # exp(-1.0 / 2.2)
    assert delta(found) == pytest.approx(0.565264, abs=1e-6)
    assert mode_of(found) is Mode.EXPERT


def test_distances_are_batch_means() -> None:
    z_t, z_s = logits(P_T, [0.2, 0.2, 0.6]), logits(P_S, [0.1, 0.2, 0.7])
    found = pair_sums(z_t, z_s, torch.tensor([0, 2]), tau=1)
    assert (found.gap, found.e_s, found.e_t) == pytest.approx((1.0, 1.8, 1.8), abs=1e-6)
    assert found.n == 2
    assert found.mean().gap == pytest.approx(0.5, abs=1e-6)


def test_temperature_softens_predictions() -> None:
    # At tau = 2 the teacher's 0.64, 0.32, 0.04 become 0.8, 0.4 sqrt 2, 0.2 over their sum.
    z_t, z_s = logits([0.64, 0.32, 0.04]), torch.zeros(1, 3)
    total = 1 + 0.4 * math.sqrt(2)
    found = pair_sums(z_t, z_s, LABEL, tau=2)
    assert found.e_t == pytest.approx(2 * (1 - 0.8 / total), abs=1e-6)
    assert found.e_s == pytest.approx(4 / 3, abs=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_the_reference(seed: int) -> None:
    z_t, z_s, y, tau = random_case(seed)
    found = pair_sums(z_t, z_s, y, tau).mean()
    gap, e_s, e_t = reference.distances(z_t, z_s, y, tau)
    assert (found.gap, found.e_s, found.e_t) == pytest.approx((gap, e_s, e_t), abs=1e-6)
    assert (epsilon(found), delta(found)) == pytest.approx(reference.threshold(e_s, e_t), abs=1e-6)
    assert mode_of(found).value == reference.mode(gap, e_s, e_t)


@pytest.mark.parametrize("seed", range(10))
def test_labels_are_the_same_as_one_hot_targets(seed: int) -> None:
    z_t, z_s, y, tau = random_case(seed)
    by_label = pair_sums(z_t, z_s, y, tau)
    soft = pair_sums(z_t, z_s, F.one_hot(y, z_t.shape[1]).float(), tau)
    assert (soft.gap, soft.n) == (by_label.gap, by_label.n)
    assert (soft.e_s, soft.e_t) == pytest.approx((by_label.e_s, by_label.e_t), abs=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_epsilon_and_delta_stay_in_their_bounds(seed: int) -> None:
    d = pair_sums(*random_case(seed)).mean()
    assert math.exp(-1) <= epsilon(d) <= 1
    assert d.e_s - d.e_t <= delta(d) <= d.e_s
    assert abs(d.e_s - d.e_t) <= d.gap + 1e-6  # triangle inequality
    assert max(d.gap, d.e_s, d.e_t) <= 2


@pytest.mark.parametrize("seed", range(10))
def test_shards_add_up_to_the_whole(seed: int) -> None:
    z_t, z_s, y, tau = random_case(seed)
    cuts = [min(5, len(y)), min(5, len(y)), min(6, len(y))]  # the second shard is empty
    summed, whole = pair_sums(z_t, z_s, y, tau, *cuts), pair_sums(z_t, z_s, y, tau)
    assert summed.n == whole.n == len(y)
    assert (summed.gap, summed.e_s, summed.e_t) == pytest.approx((whole.gap, whole.e_s, whole.e_t))


def test_several_pairs_are_measured_at_once() -> None:
    g = torch.Generator().manual_seed(0)
    z = {name: torch.randn(9, 4, generator=g) for name in TWO_TWO}
    y = torch.randint(4, (9,), generator=g)
    shards = {"t1": [slice(0, 4), slice(4, 9)], "t2": [slice(0, 9)]}
    pairs = TWO_TWO.pairs
    rows = sums_of_pairs(pairs, z, y, shards, dict.fromkeys(pairs, 2.0))
    assert rows.shape == (6, 3)
    assert rows.dtype is torch.float64
    found = means(as_parts(pairs, shards, rows.tolist()))
    assert list(found) == list(pairs)
    for pair, d in found.items():
        expected = reference.distances(z[pair.teacher], z[pair.student], y, 2.0)
        assert (d.gap, d.e_s, d.e_t, d.n) == pytest.approx((*expected, 9), abs=1e-6)
    assert sums_of_pairs([], z, y, {}, {}).shape == (0, 3)


@pytest.mark.parametrize("strategy", ["switokd", "dml"])
@pytest.mark.parametrize("seed", range(20))
def test_a_safe_decision_is_the_decision_for_any_rounding_of_the_numbers(
    seed: int, strategy: str
) -> None:
    d = pair_sums(*random_case(seed)).mean()
    rule, pair = Rule(make_strategy(strategy).switch), Pair("t", "s")
    early = decide(3, {pair: d}, rule)
    assert not unsafe_pairs(early, {pair: d}, rule)
    for shift in (-ROUNDING, ROUNDING):
        near = Distances(d.gap + shift, d.e_s - shift, d.e_t, d.n)
        assert mode_of(near, strategy) is early.mode(pair)
    # The error of float32 distances is below the allowed rounding error.
    z_t, z_s, y, tau = random_case(seed)
    exact = reference.distances(z_t, z_s, y, tau)
    for ours, truth in zip((d.gap, d.e_s, d.e_t), exact, strict=True):
        assert abs(ours - truth) < ROUNDING * (1 + truth)


def test_a_pair_at_its_threshold_is_unsafe() -> None:
    e_s, e_t = 1.2, 1.0
    at = delta(Distances(0.0, e_s, e_t, 1))
    pairs = {Pair("t", "a"): EXPERT, Pair("t", "b"): Distances(at * (1 + 1e-8), e_s, e_t, 1)}
    assert unsafe_pairs(decide(1, pairs, RULE), pairs, RULE) == (Pair("t", "b"),)
    pairs[Pair("t", "b")] = Distances(at * 1.001, e_s, e_t, 1)
    assert not unsafe_pairs(decide(1, pairs, RULE), pairs, RULE)
    almost_equal = {Pair("t", "a"): Distances(1.9, 1.0, 1.0 - 1e-9, 1)}  # e_t < e_s, but barely
    assert unsafe_pairs(decide(1, almost_equal, RULE), almost_equal, RULE)


def test_a_settled_mode_holds_whatever_the_distances_are() -> None:
    a, b = Pair("t", "a"), Pair("t", "b")
    distances = {a: EXPERT, b: EXPERT}
    assert decide(1, distances, RULE).paused == ("t",)
    decision = decide(1, distances, RULE, {b: Mode.LEARNING})
    assert [p.mode for p in decision.pairs] == [Mode.EXPERT, Mode.LEARNING]
    assert decision.paused == ()
    assert decision.pairs[1].distances == EXPERT


def test_two_exact_predictions_are_in_learning_mode() -> None:
    certain = torch.tensor([[200.0, -200.0]])
    d = pair_sums(certain, certain, LABEL, tau=1).mean()
    assert d == Distances(0, 0, 0, 1)
    assert (epsilon(d), delta(d)) == (1.0, 0.0)
    assert mode_of(d) is Mode.LEARNING


@pytest.mark.parametrize(
    ("d", "mode"),
    [
        (EXPERT, Mode.EXPERT),
        (LEARNING, Mode.LEARNING),
        (Distances(delta(EXPERT), 1.2, 1.0, 1), Mode.LEARNING),  # G = delta
        (Distances(math.nextafter(delta(EXPERT), 2), 1.2, 1.0, 1), Mode.EXPERT),
        (Distances(2.0, 1.0, 1.0, 1), Mode.LEARNING),  # the teacher is not better
        (Distances(2.0, 1.0, 1.2, 1), Mode.LEARNING),
        (Distances(1.0, 0.5, 0.0, 1), Mode.EXPERT),
    ],
)
def test_switch(d: Distances, mode: Mode) -> None:
    assert mode_of(d) is mode
    assert mode_of(d, "dml") is Mode.LEARNING


def test_a_decision_contains_the_numbers_that_led_to_it() -> None:
    pair = Pair("t", "s")
    found = decide(7, {pair: EXPERT}, RULE)
    line = PairDecision(pair, EXPERT, epsilon(EXPERT), delta(EXPERT), Mode.EXPERT)
    assert found == Decision(7, (line,), ("t",))
    assert found.mode(pair) is Mode.EXPERT
    with pytest.raises(KeyError):
        found.mode(Pair("t", "nobody"))


def decided(topology: Topology, *modes: str) -> Decision:
    """A decision with these modes (e or l), in the order of the topology's pairs."""
    distances = [EXPERT if mode == "e" else LEARNING for mode in modes]
    pairs = zip(topology.pairs, distances, strict=True)
    return decide(1, dict(pairs), RULE)


@pytest.mark.parametrize(
    ("topology", "modes", "paused"),
    [
        (ONE_ONE, "e", ("t",)),
        (ONE_ONE, "l", ()),
        (TWO_ONE, "el", ("t1",)),
        (TWO_ONE, "le", ("t2",)),
        (TWO_ONE, "ee", ("t1", "t2")),
        (ONE_TWO, "el", ()),
        (ONE_TWO, "le", ()),
        (ONE_TWO, "ee", ("t",)),
        (TWO_TWO, "eele", ("t1",)),
        (TWO_TWO, "elee", ("t2",)),
    ],
)
def test_teacher_pauses_only_when_all_its_pairs_are_in_expert_mode(
    topology: Topology, modes: str, paused: tuple[str, ...]
) -> None:
    assert decided(topology, *modes).paused == paused


@pytest.mark.parametrize(
    ("topology", "modes", "network", "peers"),
    [
        (ONE_ONE, "l", "t", ["s"]),
        (ONE_ONE, "", "s", ["t"]),
        (TWO_ONE, "ll", "t1", ["s", "t2"]),
        (TWO_ONE, "el", "t2", ["s", "t1"]),
        (TWO_ONE, "el", "t1", ["t2"]),
        (TWO_ONE, "", "s", ["t1", "t2"]),
        (ONE_TWO, "ll", "t", ["s1", "s2"]),
        (ONE_TWO, "el", "t", ["s2"]),
        (ONE_TWO, "le", "t", ["s1"]),
        (ONE_TWO, "", "s1", ["t", "s2"]),
        (ONE_TWO, "", "s2", ["t", "s1"]),
        (TWO_TWO, "elll", "t1", ["s2", "t2"]),
        (TWO_TWO, "", "s1", ["t1", "t2", "s2"]),
    ],
)
def test_peers_that_a_network_learns_from(
    topology: Topology, modes: str, network: str, peers: list[str]
) -> None:
    decision = decided(topology, *modes) if modes else None
    found = make_strategy("switokd").terms(network, couplings(topology, 0.7, 2.0), decision)
    assert found == [Term(peer, 0.7, 2.0) for peer in peers]


@pytest.mark.parametrize(
    ("topology", "network", "expected"),
    [
        (ONE_ONE, "s", {"t": 0.6}),
        (TWO_ONE, "t1", {"t2": 0.3, "s": 0.3}),
        (ONE_TWO, "s2", {"t": 0.3, "s1": 0.3}),
        (TWO_TWO, "t1", {"s1": 0.2, "s2": 0.2, "t2": 0.2}),
    ],
)
def test_mutual_learning_is_the_mean_over_peers(
    topology: Topology, network: str, expected: Mapping[str, float]
) -> None:
    found = make_strategy("dml").terms(network, couplings(topology, 0.6), None)
    assert [term.peer for term in found] == list(expected)
    assert [term.weight for term in found] == pytest.approx(list(expected.values()))


def test_topology() -> None:
    assert (TWO_TWO.name, TWO_ONE.name, ONE_TWO.name) == ("2T2S", "2T1S", "1T2S")
    assert (TWO_TWO.teachers, TWO_TWO.students) == (("t1", "t2"), ("s1", "s2"))
    pairs = [(p.teacher, p.student) for p in TWO_TWO.pairs]
    assert pairs == [("t1", "s1"), ("t1", "s2"), ("t2", "s1"), ("t2", "s2")]


def test_kl_by_hand() -> None:
    expected = 0.5 * math.log(0.5 / 0.4) + 0.4 * math.log(0.4 / 0.1) + 0.1 * math.log(0.1 / 0.5)
    assert kl(logits(P_T), logits(P_S), tau=1).item() == pytest.approx(expected, abs=1e-6)
    twice = kl(logits(P_T, P_T), logits(P_S, P_T), tau=1)
    assert twice.item() == pytest.approx(expected / 2, abs=1e-6)


def plain_objective(
    z: Tensor, y: Tensor, others: Mapping[str, Tensor], weights: Mapping[str, float], tau: float
) -> Tensor:
    """The loss formula, term by term, in float64."""
    z, n = z.double(), len(z)
    log_q = (z / tau) - (z / tau).exp().sum(1, keepdim=True).log()
    target = F.one_hot(y, z.shape[1]).double() if y.dim() == 1 else y.double()
    loss = -(target * (z - z.exp().sum(1, keepdim=True).log())).sum() / n
    for peer, weight in weights.items():
        p = (others[peer].double() / tau).softmax(1)
        loss = loss + weight * tau * tau * (p * (p.log() - log_q)).sum() / n
    return loss


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("soft", [False, True])
def test_objective_and_gradient_are_the_plain_formulas(seed: int, soft: bool) -> None:
    z_a, z, y, tau = random_case(seed)
    z_a.requires_grad_()
    others = {"a": z_a, "b": z_a.flip(0) * 0.3, "unused": z_a + torch.nan, "self": z}
    target = (z_a.detach() * 0.7).softmax(1) if soft else y
    z = z.clone().requires_grad_()
    weights = {"a": 0.7, "b": 1.3}
    loss = objective(z, target, others, [Term(p, w, tau) for p, w in weights.items()])
    loss.backward()  # type: ignore[no-untyped-call]
    assert z_a.grad is None  # no gradient crosses networks
    again = z.detach().double().requires_grad_()
    expected = plain_objective(again, target, others, weights, tau)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert z.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(z.grad, again.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "topology", [ONE_ONE, TWO_ONE, ONE_TWO, TWO_TWO], ids=lambda t: str(t.name)
)
@pytest.mark.parametrize("strategy", ["switokd", "dml"])
def test_losses_equal_the_reference_bit_for_bit(topology: Topology, strategy: str) -> None:
    """The reference adds its terms in the order of the paper; our order must be the same."""
    roles = {name: topology.role(name).value for name in topology}
    setup = reference.Setup(roles, strategy, tau=2.0, alpha=0.7, beta=1.3)
    g = torch.Generator().manual_seed(1)
    z = {name: torch.randn(16, 10, generator=g) for name in topology}
    y = torch.randint(10, (16,), generator=g)
    for modes in ("llll", "ellll", "leel"):
        decision = decided(topology, *modes[: len(topology.pairs)])
        learning = {
            (p.pair.teacher, p.pair.student) for p in decision.pairs if p.mode is Mode.LEARNING
        }
        for name in topology:
            weight = setup.alpha if topology.role(name) is S else setup.beta
            coupled = couplings(topology, weight, setup.tau)
            terms = make_strategy(strategy).terms(name, coupled, decision)
            ours = objective(z[name], y, z, terms)
            assert torch.equal(ours, reference._loss(setup, name, z, y, learning)), name
