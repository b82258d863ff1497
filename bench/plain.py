"""The plain loop as published: one process, all networks in turn, eager, contiguous, no switokd.

    python -m bench.plain INPUTS.pt

Decisions are made in the process, between forward and backward. A paused teacher skips its
backward pass and its update. With two students (1T2S) it is as in the published code, where that
differs from the paper: the first student's epsilon is made of the second's distances, and a
teacher in expert mode with both does not pause, but its loss is multiplied by 0 and goes through
backward and update. The optimizers are torch's as they come. Batches lie
ready in memory: loading costs this side nothing.

Networks are made by switokd's builders, which is all that the two sides share, and the clock.

Not covered: evaluation, learning rate schedules; temperatures and weights other than 1.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Trace:
    """What a run leaves: the seconds of each step, and its teachers in expert mode with all."""

    seconds: list[float]
    experts: list[list[str]]


def wait_for(device: torch.device) -> None:
    """Until it has done all that it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds of each step, which begins where the last one ended.

    On a GPU they are the mean of a block of steps: of the first `warm_up`, and of all others. To
    wait for the GPU after each would keep a loop from launching the next forward meanwhile.
    """

    def __init__(self, device: torch.device, warm_up: int = 0, by_step: bool | None = None) -> None:
        self.seconds: list[float] = []
        self._device, self._warm_up, self._steps = device, warm_up, 0
        self._by_step = device.type == "cpu" if by_step is None else by_step
        wait_for(device)
        self._started = time.perf_counter()

    def step(self) -> None:
        """One more step is over, as far as this process has to do with it."""
        self._steps += 1
        if self._by_step or len(self.seconds) + self._steps == self._warm_up:
            self.stop()

    def stop(self) -> None:
        """End the block; at the end of all steps, for one."""
        wait_for(self._device)
        now = time.perf_counter()
        if self._steps:
            self.seconds += [(now - self._started) / self._steps] * self._steps
        self._started, self._steps = now, 0


Distances = tuple[float, float, float]
"""Gap, e_s, e_t."""


def distances(z_t: Tensor, z_s: Tensor, y: Tensor) -> Distances:
    """Of a teacher and a student, from each other and from the labels."""
    p_t, p_s = z_t.detach().softmax(dim=1), z_s.detach().softmax(dim=1)
    target = F.one_hot(y, p_t.shape[1]).float()
    gap = (p_s - p_t).abs().sum(dim=1).mean().item()
    e_s = (p_s - target).abs().sum(dim=1).mean().item()
    e_t = (p_t - target).abs().sum(dim=1).mean().item()
    return gap, e_s, e_t


def is_expert(mine: Distances, lender: Distances) -> bool:
    """Whether the teacher is too far ahead of this student: gap > delta, and it is the better.

    lender: whose distances epsilon is made of.
    """
    gap, e_s, e_t = mine
    epsilon = math.exp(-lender[2] / (lender[1] + lender[2]))
    return gap > e_s - epsilon * e_t and e_t < e_s


def kl(z_peer: Tensor, z_self: Tensor) -> Tensor:
    """KL(p_peer || p_self), the peer detached."""
    log_p_self, p_peer = F.log_softmax(z_self, dim=1), z_peer.detach().softmax(dim=1)
    return F.kl_div(log_p_self, p_peer, reduction="batchmean")


def train(
    roles: Mapping[str, str],
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    batches: Batches,
    dml: bool = False,
    bf16: bool = False,
    warm_up: int = 0,
) -> Trace:
    """Train in place, a step per batch. roles: "teacher" or "student" by network.

    dml: nobody pauses, and each learns from the mean over all others. warm_up: see `Clock`.
    """
    teachers = [name for name in roles if roles[name] == "teacher"]
    students = [name for name in roles if roles[name] == "student"]
    lenders = dict(zip(students, students[1:] + students[-1:], strict=True))  # as published
    device = next(networks[teachers[0]].parameters()).device
    experts_by_step, clock = [], Clock(device, warm_up)
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = {name: networks[name](x) for name in roles}
        logits = {name: z.float() for name, z in logits.items()}
        pairs = [] if dml else [(t, s) for t in teachers for s in students]
        measured = {(t, s): distances(logits[t], logits[s], y) for t, s in pairs}
        experts = {(t, s) for t, s in pairs if is_expert(measured[t, s], measured[t, lenders[s]])}
        silent = [t for t in teachers if all((t, s) in experts for s in students)]
        for name in roles:
            if name in silent and len(students) == 1:
                continue
            peers = [p for p in roles if p != name and (name, p) not in experts]
            loss = F.cross_entropy(logits[name], y)
            for peer in peers:
                loss = loss + kl(logits[peer], logits[name]) / (len(peers) if dml else 1)
            if name in silent:
                loss = loss * 0
            optimizers[name].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
        clock.step()
        experts_by_step.append(silent)
    clock.stop()
    return Trace(clock.seconds, experts_by_step)


def sgd(network: nn.Module, lr: float) -> Optimizer:
    """The published code's optimizer."""
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)


def loop(
    inputs: Mapping[str, Any], device: torch.device, bf16: bool = False, warm_up: int = 0
) -> Callable[[Batches], Trace]:
    """What trains on batches, from the first weights of `inputs`, which `against.py` writes."""
    from switokd.models.registry import build

    networks: dict[str, nn.Module] = {}
    for name, model in inputs["models"].items():
        network = build(model, in_channels=3, num_classes=inputs["classes"])
        network.load_state_dict(inputs["weights"][name])
        networks[name] = network.to(device).train()
    optimizers = {name: sgd(network, inputs["lr"][name]) for name, network in networks.items()}
    dml = inputs["strategy"] == "dml"
    return lambda batches: train(inputs["roles"], networks, optimizers, batches, dml, bf16, warm_up)


def run(
    inputs: Mapping[str, Any], device: torch.device, bf16: bool = False, warm_up: int = 0
) -> Trace:
    """Train on the batches of `inputs`."""
    return loop(inputs, device, bf16, warm_up)(inputs["batches"])


if __name__ == "__main__":
    made = torch.load(sys.argv[1], weights_only=True)
    print(json.dumps(asdict(run(made, torch.device("cpu")))))
