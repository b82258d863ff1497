"""Independent oracle: switchable online knowledge distillation in one plain PyTorch process.

Written only from the papers: Qian, Wang, Yin, Hong, Wang: "Switchable Online Knowledge
Distillation", ECCV 2022, arXiv 2209.04996, and its baselines DML (Zhang et al., CVPR 2018), KDCL
(Guo et al., CVPR 2020) and KD (Hinton et al., 2015). This module imports nothing from ``switokd``,
because tests compare the distributed implementation with it. Every formula is transcribed
literally. Only networks and optimizers keep state from step to step.

Distances (G, e_s, e_t) are computed in float64: logits are converted before the softmax. So are
KDCL's combinations by least error. Losses are computed in the logits' dtype.

Not covered: training with KDCL's general combination, whose weights come from held-out images
between steps (`general_weights` is its formula).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.optim import Optimizer

LEARNING, EXPERT = "learning", "expert"
STRATEGIES = ("switokd", "threshold", "vanilla", "dml", "kd")
KDCL = ("kdcl-naive", "kdcl-linear", "kdcl-minlogit")
COMBINED = "the combined teacher"


@dataclass(frozen=True)
class Setup:
    """The settings of a run, as plain data."""

    roles: dict[str, str]  # network name -> "teacher" | "student", in order
    strategy: str
    tau: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0
    # tau, alpha and beta by network or by (teacher, student); by pair also enabled.
    own: Mapping[str | tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    semantics: str = "paper"  # "paper" | "published"
    fixed_delta: float = math.nan  # for the strategy "threshold"

    def of_role(self, role: str) -> list[str]:
        """Return the names of all teachers, or of all students, in order."""
        return [name for name, r in self.roles.items() if r == role]

    def pair(self, a: str, b: str) -> tuple[str, str] | None:
        """Return two networks as (teacher, student); None if both have the same role."""
        if self.roles[a] == self.roles[b]:
            return None
        return (a, b) if self.roles[a] == "teacher" else (b, a)

    def enabled(self, a: str, b: str) -> bool:
        """Return False if two networks are a pair that is switched off, else True."""
        pair = self.pair(a, b)
        return pair is None or bool(self.own.get(pair, {}).get("enabled", True))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All (teacher, student) pairs that are not switched off, ordered by teacher."""
        every = [(t, s) for t in self.of_role("teacher") for s in self.of_role("student")]
        return [(t, s) for t, s in every if self.enabled(t, s)]

    def setting(self, key: str, name: str, peer: str | None) -> float:
        """Return the tau, alpha or beta with which `name` learns from `peer`.

        The pair's setting overrides the network's, which overrides the run's.
        """
        pair = None if peer is None else self.pair(name, peer)
        for scope in (pair, name):
            if scope is not None and self.own.get(scope, {}).get(key) is not None:
                return self.own[scope][key]
        return {"tau": self.tau, "alpha": self.alpha, "beta": self.beta}[key]

    def weight(self, name: str, peer: str | None) -> float:
        """Return the weight of `peer` in the loss of `name`: alpha (student) or beta (teacher)."""
        return self.setting("alpha" if self.roles[name] == "student" else "beta", name, peer)


def distances(z_t: Tensor, z_s: Tensor, y: Tensor, tau: float) -> tuple[float, float, float]:
    """Return G, e_s, e_t: the batch means of L1(p_s, p_t), L1(p_s, y), L1(p_t, y).

    y: integer labels [B] or float targets [B, C]. tau softens the predictions, not y.
    """
    p_t = F.softmax(z_t.detach().double() / tau, dim=1)
    p_s = F.softmax(z_s.detach().double() / tau, dim=1)
    target = _targets(y, z_t.shape[1])
    gap = (p_s - p_t).abs().sum(dim=1).mean().item()
    e_s = (p_s - target).abs().sum(dim=1).mean().item()
    e_t = (p_t - target).abs().sum(dim=1).mean().item()
    return gap, e_s, e_t


def _targets(y: Tensor, classes: int) -> Tensor:
    """Return targets [B, C] in float64; labels [B] become one-hot rows."""
    return F.one_hot(y, num_classes=classes).double() if y.ndim == 1 else y.double()


def epsilon(e_s: float, e_t: float) -> float:
    """Return exp(-e_t / (e_s + e_t)); 1 if both distances are 0, where it is undefined."""
    return math.exp(-e_t / (e_s + e_t)) if e_s + e_t > 0 else 1.0


def threshold(e_s: float, e_t: float) -> tuple[float, float]:
    """Return epsilon, and delta = e_s - epsilon * e_t.

    If both distances are 0, delta is 0 for any epsilon.
    """
    return epsilon(e_s, e_t), e_s - epsilon(e_s, e_t) * e_t


def mode(gap: float, e_s: float, e_t: float) -> str:
    """Return expert if G > delta and e_t < e_s, else learning."""
    _, delta = threshold(e_s, e_t)
    return EXPERT if gap > delta and e_t < e_s else LEARNING


def decide(setup: Setup, logits: Mapping[str, Tensor], y: Tensor) -> dict[tuple[str, str], Any]:
    """Return gap, e_s, e_t, epsilon, delta and mode of each pair, from one step's logits.

    A pair's distances use the temperature with which its student learns from its teacher.
    """
    measured = {
        (t, s): distances(logits[t], logits[s], y, setup.setting("tau", s, t))
        for t, s in setup.pairs
    }
    teachers, students = setup.of_role("teacher"), setup.of_role("student")
    decided = {}
    for (t, s), (gap, e_s, e_t) in measured.items():
        eps = epsilon(e_s, e_t)
        if setup.semantics == "published":
            shape = (len(teachers), len(students))
            if shape == (2, 1) and t == teachers[1]:  # published slip: teacher 1's distances
                eps = epsilon(*measured[teachers[0], s][1:])
            elif shape == (1, 2) and s == students[0]:  # published slip: student 2's distances
                eps = epsilon(*measured[t, students[1]][1:])
        # Ablation: a fixed delta instead of the adaptive one; e_t < e_s is still required.
        delta = setup.fixed_delta if setup.strategy == "threshold" else e_s - eps * e_t
        pair_mode = EXPERT if gap > delta and e_t < e_s else LEARNING
        if setup.strategy == "kd":  # the teacher is frozen: expert mode throughout
            pair_mode = EXPERT
        elif setup.strategy not in ("switokd", "threshold"):
            pair_mode = LEARNING  # no teacher pauses
        numbers = {"gap": gap, "e_s": e_s, "e_t": e_t, "epsilon": eps, "delta": delta}
        decided[t, s] = {**numbers, "mode": pair_mode}
    return decided


def naive(z: list[Tensor], y: Tensor) -> Tensor:
    """Return, for each sample, the logits of the network with the least CE (the first if equal)."""
    chosen = []
    for i in range(len(y)):
        target = _targets(y, z[0].shape[1])[i]
        errors = [-(target * F.log_softmax(z_k[i].double(), dim=0)).sum().item() for z_k in z]
        chosen.append(z[errors.index(min(errors))][i])
    return torch.stack(chosen)


def minlogit(z: list[Tensor], y: Tensor) -> Tensor:
    """Shift each network's logits so that the true class has 0; return the minimum of each class.

    The true class of a soft target is the one with the largest probability.
    """
    labels = [int(row.argmax()) for row in _targets(y, z[0].shape[1])]
    shifted = [torch.stack([z_k[i] - z_k[i, c] for i, c in enumerate(labels)]) for z_k in z]
    return torch.stack(shifted).amin(dim=0)


def linear_weights(z: list[Tensor], y: Tensor) -> list[float]:
    """Return the convex weights w that minimise CE(sum w_i z_i, y) over the whole batch.

    SLSQP finds the weights that are 0, and half of the digits of the others. Newton's method
    refines the others, because 25 training steps would amplify the missing digits.
    """
    stacked = torch.stack([z_k.detach().double() for z_k in z])  # [networks, B, C]
    target = _targets(y, stacked.shape[2])

    def cross_entropy(w: Tensor) -> Tensor:
        log_p = F.log_softmax(torch.einsum("k,kbc->bc", w, stacked), dim=1)
        return -(target * log_p).sum(dim=1).mean()

    def error(w: Any) -> tuple[float, Any]:
        weights = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        loss = cross_entropy(weights)
        (gradient,) = torch.autograd.grad(loss, weights)
        return loss.item(), gradient.numpy()

    solution = minimize(
        error,
        np.full(len(z), 1 / len(z)),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * len(z),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    w = torch.tensor(np.where(solution.x < 1e-5, 0.0, solution.x), dtype=torch.float64)
    free = w > 0
    ones = torch.ones(int(free.sum()), 1, dtype=torch.float64)
    for _ in range(4):
        w[free] += (1 - w.sum()) / free.sum()
        gradient = jacobian(cross_entropy, w)[free]  # type: ignore[no-untyped-call]
        curvature = hessian(cross_entropy, w)[free][:, free]  # type: ignore[no-untyped-call]
        system = torch.cat([torch.cat([curvature, ones], 1), torch.cat([ones.T, 0 * ones[:1]], 1)])
        step = torch.linalg.lstsq(system, torch.cat([-gradient, gradient.new_zeros(1)])).solution
        w[free] += step[:-1]
    return w.tolist()


def general_weights(z: list[Tensor], y: Tensor) -> list[float]:
    """Return w = C^-1 1 / (1^T C^-1 1); C_ij is the mean of (p_i - y).(p_j - y) over samples."""
    errors = [F.softmax(z_k.detach().double(), dim=1) - _targets(y, z_k.shape[1]) for z_k in z]
    covariance = np.array([[(a * b).sum(dim=1).mean().item() for b in errors] for a in errors])
    unnormalised = np.linalg.solve(covariance, np.ones(len(z)))
    return [float(w) for w in unnormalised / unnormalised.sum()]


def weighted(z: list[Tensor], weights: list[float]) -> Tensor:
    """Return the logits sum w_i z_i in float64."""
    return torch.stack([w * z_k.double() for z_k, w in zip(z, weights, strict=True)]).sum(dim=0)


def combined(strategy: str, logits: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """Return the logits [B, C] of KDCL's combined teacher, from all networks' detached logits."""
    z = [z_k.detach() for z_k in logits.values()]
    if strategy == "kdcl-naive":
        return naive(z, y)
    if strategy == "kdcl-minlogit":
        return minlogit(z, y)
    if strategy == "kdcl-linear":
        return weighted(z, linear_weights(z, y)).to(z[0].dtype)
    raise ValueError(f"no combination: {strategy}")


def _kl(z_peer: Tensor, z_self: Tensor, tau: float) -> Tensor:
    """Return KL(p_peer || p_self); no gradient flows into the peer."""
    return F.kl_div(
        F.log_softmax(z_self / tau, dim=1),
        F.softmax(z_peer.detach() / tau, dim=1),
        reduction="batchmean",
    )


def _peers(setup: Setup, name: str, learning: set[tuple[str, str]]) -> list[str]:
    """Return the peers that a network learns from, in the order of the terms of its loss."""
    others = [other for other in setup.roles if other != name and setup.enabled(name, other)]
    teachers = [other for other in others if setup.roles[other] == "teacher"]
    students = [other for other in others if setup.roles[other] == "student"]
    if setup.strategy == "vanilla":
        return []
    if setup.strategy == "dml":
        return others
    if setup.strategy == "kd":
        return teachers if setup.roles[name] == "student" else []
    if setup.roles[name] == "student":
        return teachers + students
    return [s for s in students if (name, s) in learning] + teachers


def _loss(
    setup: Setup, name: str, logits: Mapping[str, Tensor], y: Tensor, learning: set[tuple[str, str]]
) -> Tensor:
    """Return the loss of a network that is not paused.

    learning: the (teacher, student) pairs in learning mode. logits: with KDCL, these include the
    COMBINED teacher's.
    """
    loss = F.cross_entropy(logits[name], y)
    if setup.strategy in KDCL:
        tau = setup.setting("tau", name, None)
        return loss + setup.weight(name, None) * tau**2 * _kl(logits[COMBINED], logits[name], tau)
    peers = _peers(setup, name, learning)
    for peer in peers:
        weight, tau = setup.weight(name, peer), setup.setting("tau", name, peer)
        if setup.strategy == "dml":  # mean over n peers: each has a weight of 1/n
            weight = weight / len(peers)
        kl = _kl(logits[peer], logits[name], tau)
        loss = loss + weight * tau**2 * kl
    return loss


def train(
    setup: Setup,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> list[dict[str, Any]]:
    """Train in place, one step per batch; return one record per step and pair."""
    _check(setup)
    frozen = setup.of_role("teacher") if setup.strategy == "kd" else []
    # The published 1T2S code multiplies the loss of a paused teacher by 0, and updates as usual.
    shape = (len(setup.of_role("teacher")), len(setup.of_role("student")))
    goes_on = setup.semantics == "published" and shape == (1, 2)
    records: list[dict[str, Any]] = []
    for step, (x, y) in enumerate(batches, start=1):
        logits: dict[str, Tensor] = {}
        for name in setup.roles:  # paused teachers too: their BatchNorm statistics move
            logits[name] = models[name].train(name not in frozen)(x)
        decided = decide(setup, logits, y)
        for (t, s), numbers in decided.items():
            records.append({"step": step, "teacher": t, "student": s, "n": len(y), **numbers})
        if setup.strategy in KDCL:
            logits[COMBINED] = combined(setup.strategy, logits, y)

        learning = {pair for pair in setup.pairs if decided[pair]["mode"] == LEARNING}
        having_pairs = {t for t, _ in setup.pairs}  # a teacher without pairs never pauses
        paused = having_pairs - {t for t, _ in learning}
        active = [n for n in setup.roles if n not in frozen and (n not in paused or goes_on)]
        losses = {name: _loss(setup, name, logits, y, learning) for name in active}
        for name in active:
            optimizers[name].zero_grad()
            torch.autograd.backward(losses[name] * 0 if name in paused else losses[name])
            optimizers[name].step()
    return records


def _check(setup: Setup) -> None:
    """Raise ValueError if the oracle does not support the setup."""
    if setup.strategy not in (*STRATEGIES, *KDCL):
        raise ValueError(f"unknown strategy: {setup.strategy}")
    if not set(setup.roles.values()) <= {"teacher", "student"}:
        raise ValueError(f"unknown role in: {setup.roles}")
    if setup.semantics not in ("paper", "published"):
        raise ValueError(f"unknown semantics: {setup.semantics}")
