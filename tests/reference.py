"""Independent oracle: switchable online knowledge distillation in one plain PyTorch process.

Written from the papers alone: the method of Qian, Wang, Yin, Hong, Wang: "Switchable Online
Knowledge Distillation", ECCV 2022, arXiv 2209.04996, and of its baselines DML (Zhang et al., CVPR
2018), KDCL (Guo et al., CVPR 2020) and KD (Hinton et al., 2015). It imports nothing of
``switokd``: the distributed implementation is compared with it, so it must be able to disagree.
Every formula is transcribed literally, and no state but the networks' and optimizers' own passes
from step to step.

Distances (G, e_s, e_t) are done fully in float64: the logits are converted before the softmax.
So are KDCL's least-error combinations. Losses are done in the logits' own dtype.

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
    """What a run needs, as plain data."""

    roles: dict[str, str]  # network name -> "teacher" | "student", in order
    strategy: str
    tau: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0
    # By network, or by (teacher, student): tau, alpha, beta of its own; by pair also enabled.
    own: Mapping[str | tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    semantics: str = "paper"  # "paper" | "published"
    fixed_delta: float = math.nan  # of the strategy "threshold"

    def of_role(self, role: str) -> list[str]:
        """Names of the teachers, or of the students, in order."""
        return [name for name, r in self.roles.items() if r == role]

    def pair(self, a: str, b: str) -> tuple[str, str] | None:
        """The pair (teacher, student) that two networks are; None for two of a role."""
        if self.roles[a] == self.roles[b]:
            return None
        return (a, b) if self.roles[a] == "teacher" else (b, a)

    def enabled(self, a: str, b: str) -> bool:
        """Whether two networks have to do with each other: only a pair can be switched off."""
        pair = self.pair(a, b)
        return pair is None or bool(self.own.get(pair, {}).get("enabled", True))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The (teacher, student) pairs that are not switched off, teachers outermost."""
        every = [(t, s) for t in self.of_role("teacher") for s in self.of_role("student")]
        return [(t, s) for t, s in every if self.enabled(t, s)]

    def setting(self, key: str, name: str, peer: str | None) -> float:
        """tau, alpha or beta by which `name` learns from `peer`.

        The pair's comes before the network's, and that before the run's.
        """
        pair = None if peer is None else self.pair(name, peer)
        for scope in (pair, name):
            if scope is not None and self.own.get(scope, {}).get(key) is not None:
                return self.own[scope][key]
        return {"tau": self.tau, "alpha": self.alpha, "beta": self.beta}[key]

    def weight(self, name: str, peer: str | None) -> float:
        """alpha where a student learns from `peer`, beta where a teacher does."""
        return self.setting("alpha" if self.roles[name] == "student" else "beta", name, peer)


def distances(z_t: Tensor, z_s: Tensor, y: Tensor, tau: float) -> tuple[float, float, float]:
    """G, e_s, e_t: batch means of L1(p_s, p_t), L1(p_s, y), L1(p_t, y).

    y is integer labels [B] or float targets [B, C]; tau softens the predictions, never y.
    """
    p_t = F.softmax(z_t.detach().double() / tau, dim=1)
    p_s = F.softmax(z_s.detach().double() / tau, dim=1)
    target = _targets(y, z_t.shape[1])
    gap = (p_s - p_t).abs().sum(dim=1).mean().item()
    e_s = (p_s - target).abs().sum(dim=1).mean().item()
    e_t = (p_t - target).abs().sum(dim=1).mean().item()
    return gap, e_s, e_t


def _targets(y: Tensor, classes: int) -> Tensor:
    """Labels [B] as one-hot rows [B, C]; what is rows already stays; float64."""
    return F.one_hot(y, num_classes=classes).double() if y.ndim == 1 else y.double()


def epsilon(e_s: float, e_t: float) -> float:
    """exp(-e_t / (e_s + e_t)); 1 where both predictions are exact, which leaves it undefined."""
    return math.exp(-e_t / (e_s + e_t)) if e_s + e_t > 0 else 1.0


def threshold(e_s: float, e_t: float) -> tuple[float, float]:
    """epsilon and delta = e_s - epsilon * e_t.

    Where both predictions are exact delta is 0 whatever epsilon is.
    """
    return epsilon(e_s, e_t), e_s - epsilon(e_s, e_t) * e_t


def mode(gap: float, e_s: float, e_t: float) -> str:
    """Expert if G > delta and e_t < e_s, learning otherwise."""
    _, delta = threshold(e_s, e_t)
    return EXPERT if gap > delta and e_t < e_s else LEARNING


def decide(setup: Setup, logits: Mapping[str, Tensor], y: Tensor) -> dict[tuple[str, str], Any]:
    """By pair: gap, e_s, e_t, epsilon, delta, mode, from one step's logits.

    A pair's distances are taken at the temperature at which its student learns from its teacher.
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
            if shape == (2, 1) and t == teachers[1]:  # the slip: teacher 1's distances
                eps = epsilon(*measured[teachers[0], s][1:])
            elif shape == (1, 2) and s == students[0]:  # the slip: student 2's distances
                eps = epsilon(*measured[t, students[1]][1:])
        # The fixed delta is an ablation of the adaptive one; the rest of the condition stays.
        delta = setup.fixed_delta if setup.strategy == "threshold" else e_s - eps * e_t
        found = EXPERT if gap > delta and e_t < e_s else LEARNING
        if setup.strategy == "kd":  # the teacher is frozen: expert mode throughout
            found = EXPERT
        elif setup.strategy not in ("switokd", "threshold"):
            found = LEARNING  # nobody pauses
        numbers = {"gap": gap, "e_s": e_s, "e_t": e_t, "epsilon": eps, "delta": delta}
        decided[t, s] = {**numbers, "mode": found}
    return decided


def naive(z: list[Tensor], y: Tensor) -> Tensor:
    """For each sample the logits of the network with the least CE, the first of equals."""
    chosen = []
    for i in range(len(y)):
        target = _targets(y, z[0].shape[1])[i]
        errors = [-(target * F.log_softmax(z_k[i].double(), dim=0)).sum().item() for z_k in z]
        chosen.append(z[errors.index(min(errors))][i])
    return torch.stack(chosen)


def minlogit(z: list[Tensor], y: Tensor) -> Tensor:
    """Every network's logits shifted so that the true class's is 0, then the least, class by class.

    With a distribution as target, the true class is the one with most of it.
    """
    labels = [int(row.argmax()) for row in _targets(y, z[0].shape[1])]
    shifted = [torch.stack([z_k[i] - z_k[i, c] for i, c in enumerate(labels)]) for z_k in z]
    return torch.stack(shifted).amin(dim=0)


def linear_weights(z: list[Tensor], y: Tensor) -> list[float]:
    """The convex weights w of least CE(sum w_i z_i, y) over the whole batch.

    By SLSQP, which finds those that are 0 and half of the others' digits; the rest by Newton's
    method among those others, because 25 steps of training make much of what is missing.
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

    found = minimize(
        error,
        np.full(len(z), 1 / len(z)),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * len(z),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    w = torch.tensor(np.where(found.x < 1e-5, 0.0, found.x), dtype=torch.float64)
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
    """w = C^-1 1 / (1^T C^-1 1), with C_ij = mean over held-out samples of (p_i - y).(p_j - y)."""
    errors = [F.softmax(z_k.detach().double(), dim=1) - _targets(y, z_k.shape[1]) for z_k in z]
    covariance = np.array([[(a * b).sum(dim=1).mean().item() for b in errors] for a in errors])
    unnormalised = np.linalg.solve(covariance, np.ones(len(z)))
    return [float(w) for w in unnormalised / unnormalised.sum()]


def weighted(z: list[Tensor], weights: list[float]) -> Tensor:
    """The logits sum w_i z_i, in float64."""
    return torch.stack([w * z_k.double() for z_k, w in zip(z, weights, strict=True)]).sum(dim=0)


def combined(strategy: str, logits: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """KDCL's combined teacher: logits [B, C] made of all networks' logits, detached."""
    z = [z_k.detach() for z_k in logits.values()]
    if strategy == "kdcl-naive":
        return naive(z, y)
    if strategy == "kdcl-minlogit":
        return minlogit(z, y)
    if strategy == "kdcl-linear":
        return weighted(z, linear_weights(z, y)).to(z[0].dtype)
    raise ValueError(f"no combination: {strategy}")


def _kl(z_peer: Tensor, z_self: Tensor, tau: float) -> Tensor:
    """KL(p_peer || p_self), the peer detached."""
    return F.kl_div(
        F.log_softmax(z_self / tau, dim=1),
        F.softmax(z_peer.detach() / tau, dim=1),
        reduction="batchmean",
    )


def _peers(setup: Setup, name: str, learning: set[tuple[str, str]]) -> list[str]:
    """Whom a network learns from, in the order of the loss's terms."""
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
    """The loss of a network that is not paused; learning holds (teacher, student) pairs.

    For KDCL, logits also holds the COMBINED teacher's.
    """
    loss = F.cross_entropy(logits[name], y)
    if setup.strategy in KDCL:
        tau = setup.setting("tau", name, None)
        return loss + setup.weight(name, None) * tau**2 * _kl(logits[COMBINED], logits[name], tau)
    peers = _peers(setup, name, learning)
    for peer in peers:
        weight, tau = setup.weight(name, peer), setup.setting("tau", name, peer)
        if setup.strategy == "dml":  # the mean over n peers: each peer has a weight of 1/n
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
    """Train in place, one step per batch; one record per step and pair, teachers outermost."""
    _check(setup)
    frozen = setup.of_role("teacher") if setup.strategy == "kd" else []
    # The published code multiplies its 1T2S teacher's loss by 0, and then goes on.
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
        having_pairs = {t for t, _ in setup.pairs}  # without any, nothing pauses a teacher
        paused = having_pairs - {t for t, _ in learning}
        active = [n for n in setup.roles if n not in frozen and (n not in paused or goes_on)]
        losses = {name: _loss(setup, name, logits, y, learning) for name in active}
        for name in active:
            optimizers[name].zero_grad()
            torch.autograd.backward(losses[name] * 0 if name in paused else losses[name])
            optimizers[name].step()
    return records


def _check(setup: Setup) -> None:
    """ValueError for a setup that the oracle does not know."""
    if setup.strategy not in (*STRATEGIES, *KDCL):
        raise ValueError(f"unknown strategy: {setup.strategy}")
    if not set(setup.roles.values()) <= {"teacher", "student"}:
        raise ValueError(f"unknown role in: {setup.roles}")
    if setup.semantics not in ("paper", "published"):
        raise ValueError(f"unknown semantics: {setup.semantics}")
