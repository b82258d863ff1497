"""What bounds speed on a CPU: a plain fp32 step of WRN-16-2 over its convolutions alone.

The convolutions are run by themselves, in fp32 and in bf16, forward and both halves of backward, in
NHWC order, as ours runs them, with everything between them left out. Nothing that calls the same
kernels and never pauses can be faster against the plain loop than this, and how close the kernels
come to a large matrix product says whether better ones are to be expected.

Not covered: algorithms with fewer multiplications (Winograd), which oneDNN has not for training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.figures import Figure, Say, alternate
from bench.runs import BATCH, CLASSES
from switokd.models import build

FIGURES = ("plain_over_convolutions", "plain_over_convolutions_bf16")
NETWORK, SIDE = "wrn-16-2", 32
convolution_backward = torch.ops.aten.convolution_backward


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give plain_over_convolutions, of fp32 and of bf16."""
    rounds = 1 if quick else 7
    plain = plain_step()
    for name, dtype in zip(FIGURES, (torch.float32, torch.bfloat16), strict=True):
        say(f"a plain step of {NETWORK} against its convolutions alone, {dtype}")
        yield _over_convolutions(name, plain, dtype, rounds)


def _over_convolutions(
    name: str, plain: Callable[[], None], dtype: torch.dtype, rounds: int
) -> Figure:
    alone, operations = convolutions(dtype)
    pairs = alternate(rounds, lambda: _seconds(plain), lambda: _seconds(alone))
    matrix = torch.randn(2048, 2048).to(dtype)
    product = min(_seconds(lambda: matrix @ matrix) for _ in range(rounds))
    return Figure.of_pairs(
        name,
        pairs,
        what=f"a plain fp32 step over its convolutions alone, NHWC, {dtype}: what these kernels "
        "allow",
        details={
            "network": NETWORK,
            "batch_size": BATCH,
            "threads": torch.get_num_threads(),
            "gflops_of_convolutions": operations / median(b for _, b in pairs) / 1e9,
            "gflops_of_a_matrix_product": 2 * 2048**3 / product / 1e9,
        },
    )


def plain_step() -> Callable[[], None]:
    """One network's step as in the plain loop, without the other networks."""
    network = build(NETWORK, 3, CLASSES)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    x, y = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(CLASSES, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def convolutions(dtype: torch.dtype = torch.float32) -> tuple[Callable[[], None], float]:
    """All its convolutions, forward and backward, and the floating-point operations in them."""
    network = build(NETWORK, 3, CLASSES).to(memory_format=torch.channels_last)
    layers: list[tuple[nn.Conv2d, Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        layers.append((layer, inputs[0].detach().to(dtype), torch.randn_like(output).to(dtype)))

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(keep)
    x = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        network(x)
    network = network.to(dtype)
    forward = [
        2 * g.numel() * layer.weight[0].numel() for layer, _, g in layers
    ]  # a multiplication and an addition for each weight of an output channel
    operations = 3 * sum(forward) - forward[0]  # the images need no gradient

    @torch.no_grad()
    def run() -> None:
        for i, (layer, x, g) in enumerate(layers):
            F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
            sizes = layer.stride, layer.padding, (1, 1), False, (0, 0), 1
            convolution_backward(g, x, layer.weight, None, *sizes, [i > 0, True, False])

    return run, float(operations)


def _seconds(run: Callable[[], object], repetitions: int = 5) -> float:
    """Median seconds, after a first time that does not count."""
    taken = []
    for _ in range(1 + repetitions):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return median(taken[1:])
