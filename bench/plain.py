"""The plain loop, like the published code: one process, one network after another, eager.

    python -m bench.plain INPUTS.pt

Decisions are made in the process, between forward and backward pass. A paused teacher skips its
backward pass and its optimizer step. With two students (1T2S) the loop follows the published code
where the code differs from the paper. The first student's epsilon is computed from the second
student's distances. A teacher in expert mode with both students does not pause: its loss is
multiplied by 0, and backward pass and optimizer step run.

Optimizers are PyTorch's defaults. Batches are in memory, so that loading takes no time. Both sides
share only the builders of networks and the clock.

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
    """Measurements of a run, by step."""

    seconds: list[float]
    experts: list[list[str]]
    """Teachers in expert mode with all their students."""


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work; returns at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Measures the seconds of each step; a step starts at the end of the previous one.

    On a GPU the steps are measured in two blocks, the first `warm_up` steps and the others, and
    each step gets the mean of its block. Waiting for the GPU after every step would prevent the
    loop from launching the next forward pass early.
    """

    def __init__(self, device: torch.device, warm_up: int = 0, by_step: bool | None = None) -> None:
        self.seconds: list[float] = []
        self._device, self._warm_up, self._steps = device, warm_up, 0
        self._by_step = device.type == "cpu" if by_step is None else by_step
        wait_for(device)
        self._started = time.perf_counter()

    def step(self) -> None:
        """Count a step whose work has been launched."""
        self._steps += 1
        if self._by_step or len(self.seconds) + self._steps == self._warm_up:
            self.stop()

    def stop(self) -> None:
        """End a block of steps."""
        wait_for(self._device)
        now = time.perf_counter()
        if self._steps:
            self.seconds += [(now - self._started) / self._steps] * self._steps
        self._started, self._steps = now, 0


Distances = tuple[float, float, float]
"""Gap, e_s, e_t."""


def distances(z_t: Tensor, z_s: Tensor, y: Tensor) -> Distances:
    """Distances of a pair from its logits `[B, C]` and labels `[B]`."""
    p_t, p_s = z_t.detach().softmax(dim=1), z_s.detach().softmax(dim=1)
    target = F.one_hot(y, p_t.shape[1]).float()
    gap = (p_s - p_t).abs().sum(dim=1).mean().item()
    e_s = (p_s - target).abs().sum(dim=1).mean().item()
    e_t = (p_t - target).abs().sum(dim=1).mean().item()
    return gap, e_s, e_t


def is_expert(of_pair: Distances, for_epsilon: Distances) -> bool:
    """Whether a pair is in expert mode: gap > delta, and the teacher is better.

    for_epsilon: the distances that epsilon is computed from.
    """
    gap, e_s, e_t = of_pair
    epsilon = math.exp(-for_epsilon[2] / (for_epsilon[1] + for_epsilon[2]))
    return gap > e_s - epsilon * e_t and e_t < e_s


def kl(z_peer: Tensor, z_self: Tensor) -> Tensor:
    """KL(p_peer || p_self), with the peer's logits detached."""
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
    """Train the networks in place, one step per batch.

    roles: "teacher" or "student" by network. dml: deep mutual learning instead of switching, with
    no pauses and the mean over all peers. bf16: run forward passes under autocast. warm_up: see
    `Clock`.
    """
    teachers = [name for name in roles if roles[name] == "teacher"]
    students = [name for name in roles if roles[name] == "student"]
    # As published: the first of two students takes epsilon from the second.
    epsilon_of = dict(zip(students, students[1:] + students[-1:], strict=True))
    device = next(networks[teachers[0]].parameters()).device
    experts_by_step, clock = [], Clock(device, warm_up)
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = {name: networks[name](x) for name in roles}
        logits = {name: z.float() for name, z in logits.items()}
        pairs = [] if dml else [(t, s) for t in teachers for s in students]
        measured = {(t, s): distances(logits[t], logits[s], y) for t, s in pairs}
        experts = {
            (t, s) for t, s in pairs if is_expert(measured[t, s], measured[t, epsilon_of[s]])
        }
        only_experts = [t for t in teachers if all((t, s) in experts for s in students)]
        for name in roles:
            if name in only_experts and len(students) == 1:
                continue
            peers = [p for p in roles if p != name and (name, p) not in experts]
            loss = F.cross_entropy(logits[name], y)
            for peer in peers:
                loss = loss + kl(logits[peer], logits[name]) / (len(peers) if dml else 1)
            if name in only_experts:
                loss = loss * 0
            optimizers[name].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
        clock.step()
        experts_by_step.append(only_experts)
    clock.stop()
    return Trace(clock.seconds, experts_by_step)


def sgd(network: nn.Module, lr: float) -> Optimizer:
    """The published code's optimizer."""
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)


def loop(
    inputs: Mapping[str, Any], device: torch.device, bf16: bool = False, warm_up: int = 0
) -> Callable[[Batches], Trace]:
    """Function that trains on batches, from the initial weights in `inputs` (see `against.py`)."""
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
    saved = torch.load(sys.argv[1], weights_only=True)
    print(json.dumps(asdict(run(saved, torch.device("cpu")))))
