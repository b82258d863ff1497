"""The plain loop as published: one process, all networks in turn, eager, contiguous, no switokd.

    python -m bench.plain INPUTS.pt

Decisions are made in the process, between forward and backward. A paused teacher skips its
backward pass and its update; only with several students it does as the published code: its loss
is multiplied by 0 and goes through both. The optimizers are torch's as they come. Batches lie
ready in memory: loading costs this side nothing.

Networks are made by switokd's builders, which is all that the two sides share.

Not covered: evaluation, learning rate schedules; temperatures and weights other than 1.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class Trace:
    """What a run leaves: the seconds of each step, and its paused teachers."""

    seconds: list[float] = field(default_factory=list)
    paused: list[list[str]] = field(default_factory=list)


def is_expert(z_t: Tensor, z_s: Tensor, y: Tensor) -> bool:
    """Whether the teacher is too far ahead of this student: gap > delta, and it is the better."""
    p_t, p_s = z_t.detach().softmax(dim=1), z_s.detach().softmax(dim=1)
    target = F.one_hot(y, p_t.shape[1]).float()
    gap = (p_s - p_t).abs().sum(dim=1).mean().item()
    e_s = (p_s - target).abs().sum(dim=1).mean().item()
    e_t = (p_t - target).abs().sum(dim=1).mean().item()
    delta = e_s - math.exp(-e_t / (e_s + e_t)) * e_t
    return gap > delta and e_t < e_s


def kl(z_peer: Tensor, z_self: Tensor) -> Tensor:
    """KL(p_peer || p_self), the peer detached."""
    log_p_self, p_peer = F.log_softmax(z_self, dim=1), z_peer.detach().softmax(dim=1)
    return F.kl_div(log_p_self, p_peer, reduction="batchmean")


def train(
    roles: Mapping[str, str],
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    batches: Iterable[tuple[Tensor, Tensor]],
    dml: bool = False,
    bf16: bool = False,
) -> Trace:
    """Train in place, a step per batch. roles: "teacher" or "student" by network.

    dml: nobody pauses, and each learns from the mean over all others.
    """
    teachers = [name for name in roles if roles[name] == "teacher"]
    students = [name for name in roles if roles[name] == "student"]
    trace, device = Trace(), next(networks[teachers[0]].parameters()).device
    for x, y in batches:
        started = time.perf_counter()
        x, y = x.to(device), y.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = {name: networks[name](x) for name in roles}
        logits = {name: z.float() for name, z in logits.items()}
        experts = {
            (t, s) for t in teachers for s in students
            if not dml and is_expert(logits[t], logits[s], y)
        }  # fmt: skip
        paused = [t for t in teachers if all((t, s) in experts for s in students)]
        for name in roles:
            if name in paused and len(students) == 1:
                continue
            peers = [p for p in roles if p != name and (name, p) not in experts]
            loss = F.cross_entropy(logits[name], y)
            for peer in peers:
                loss = loss + kl(logits[peer], logits[name]) / (len(peers) if dml else 1)
            if name in paused:
                loss = loss * 0
            optimizers[name].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        trace.seconds.append(time.perf_counter() - started)
        trace.paused.append(paused)
    return trace


def sgd(network: nn.Module, lr: float) -> Optimizer:
    """The published code's optimizer."""
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)


def run(inputs: Mapping[str, Any], device: torch.device, bf16: bool = False) -> Trace:
    """Train from the first weights and on the batches of `inputs`, which `against.py` writes."""
    from switokd.models import build

    networks: dict[str, nn.Module] = {}
    for name, model in inputs["models"].items():
        network = build(model, in_channels=3, num_classes=inputs["classes"])
        network.load_state_dict(inputs["weights"][name])
        networks[name] = network.to(device).train()
    optimizers = {name: sgd(network, inputs["lr"][name]) for name, network in networks.items()}
    dml = inputs["strategy"] == "dml"
    return train(inputs["roles"], networks, optimizers, inputs["batches"], dml, bf16)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    made = torch.load(sys.argv[1], weights_only=True)
    print(json.dumps(asdict(run(made, torch.device("cpu")))))
