"""Independent oracle: switchable online knowledge distillation in one plain PyTorch process.

Written from the paper's method alone (Qian, Wang, Yin, Hong, Wang: "Switchable Online Knowledge
Distillation", ECCV 2022, arXiv 2209.04996). It imports nothing of ``switokd``: the distributed
implementation is compared with it, so it must be able to disagree. Every formula is transcribed
literally, and no state but the networks' and optimizers' own passes from step to step.

Distances (G, e_s, e_t) are done fully in float64: the logits are converted before the softmax.
Losses are done in the logits' own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Setup:
    """What a run needs, as plain data."""

    roles: dict[str, str]  # network name -> "teacher" | "student", in order
    strategy: str  # "switokd" | "dml"
    tau: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0


def distances(z_t: Tensor, z_s: Tensor, y: Tensor, tau: float) -> tuple[float, float, float]:
    """G, e_s, e_t: batch means of L1(p_s, p_t), L1(p_s, y), L1(p_t, y).

    y is integer labels [B] or float targets [B, C]; tau softens the predictions, never y.
    """
    p_t = F.softmax(z_t.detach().double() / tau, dim=1)
    p_s = F.softmax(z_s.detach().double() / tau, dim=1)
    target = F.one_hot(y, num_classes=z_t.shape[1]).double() if y.ndim == 1 else y.double()
    gap = (p_s - p_t).abs().sum(dim=1).mean().item()
    e_s = (p_s - target).abs().sum(dim=1).mean().item()
    e_t = (p_t - target).abs().sum(dim=1).mean().item()
    return gap, e_s, e_t


def threshold(e_s: float, e_t: float) -> tuple[float, float]:
    """epsilon = exp(-e_t / (e_s + e_t)) and delta = e_s - epsilon * e_t.

    Where both predictions are exact (e_s + e_t = 0) epsilon is undefined: 1 is returned, and
    delta is 0 whatever epsilon is.
    """
    epsilon = math.exp(-e_t / (e_s + e_t)) if e_s + e_t > 0 else 1.0
    return epsilon, e_s - epsilon * e_t


def mode(gap: float, e_s: float, e_t: float) -> str:
    """Expert if G > delta and e_t < e_s, learning otherwise."""
    _, delta = threshold(e_s, e_t)
    return "expert" if gap > delta and e_t < e_s else "learning"


def _kl(z_peer: Tensor, z_self: Tensor, tau: float) -> Tensor:
    """KL(p_peer || p_self), the peer detached."""
    return F.kl_div(
        F.log_softmax(z_self / tau, dim=1),
        F.softmax(z_peer.detach() / tau, dim=1),
        reduction="batchmean",
    )


def _loss(
    setup: Setup, name: str, logits: Mapping[str, Tensor], y: Tensor, learning: set[tuple[str, str]]
) -> Tensor:
    """The loss of a network that is not paused; learning holds (teacher, student) pairs."""
    role = setup.roles[name]
    weight = setup.alpha if role == "student" else setup.beta
    others = [other for other in setup.roles if other != name]
    teachers = [other for other in others if setup.roles[other] == "teacher"]
    students = [other for other in others if setup.roles[other] == "student"]
    if setup.strategy == "dml":  # the mean over n peers: each peer has a weight of 1/n
        peers = others
        weight = weight / max(len(peers), 1)
    elif role == "student":
        peers = teachers + students
    else:
        peers = [s for s in students if (name, s) in learning] + teachers
    loss = F.cross_entropy(logits[name], y)
    for peer in peers:
        kl = _kl(logits[peer], logits[name], setup.tau)
        loss = loss + weight * setup.tau**2 * kl
    return loss


def train(
    setup: Setup,
    models: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> list[dict[str, Any]]:
    """Train in place, one step per batch; one record per step and pair, teachers outermost."""
    if setup.strategy not in ("switokd", "dml"):
        raise ValueError(f"unknown strategy: {setup.strategy}")
    if not set(setup.roles.values()) <= {"teacher", "student"}:
        raise ValueError(f"unknown role in: {setup.roles}")
    teachers = [name for name, role in setup.roles.items() if role == "teacher"]
    students = [name for name, role in setup.roles.items() if role == "student"]
    pairs = [(t, s) for t in teachers for s in students]
    records: list[dict[str, Any]] = []
    for step, (x, y) in enumerate(batches, start=1):
        logits: dict[str, Tensor] = {}
        for name in setup.roles:  # paused teachers too: their BatchNorm statistics move
            logits[name] = models[name].train()(x)

        modes: dict[tuple[str, str], str] = {}
        for t, s in pairs:
            gap, e_s, e_t = distances(logits[t], logits[s], y, setup.tau)
            epsilon, delta = threshold(e_s, e_t)
            modes[t, s] = "learning" if setup.strategy == "dml" else mode(gap, e_s, e_t)
            record = {"step": step, "teacher": t, "student": s, "gap": gap, "e_s": e_s, "e_t": e_t}
            record |= {"epsilon": epsilon, "delta": delta, "mode": modes[t, s], "n": len(y)}
            records.append(record)

        learning = {pair for pair in pairs if modes[pair] == "learning"}
        # A teacher without any student has no pair to pause it.
        paused = {t for t in teachers if students and all((t, s) not in learning for s in students)}
        active = [name for name in setup.roles if name not in paused]
        losses = {name: _loss(setup, name, logits, y, learning) for name in active}
        for name in active:
            optimizers[name].zero_grad()
            torch.autograd.backward(losses[name])
            optimizers[name].step()
    return records
