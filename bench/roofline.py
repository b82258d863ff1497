"""Upper bound of the speed on a CPU: plain fp32 steps over the time of their convolutions alone.

The convolutions run alone, in fp32 and in bf16, forward and backward, in NHWC layout like in
switokd. Everything between them is left out. No program that uses the same kernels and never pauses
can be faster against the plain loop. The speed of a large matrix product shows whether better
kernels are possible. The details also have the bytes that convolutions pass to BatchNorm and ReLU,
and the speed of copying bytes.

Measured for WRN-16-2 and for the unequal networks, with a row per network.

Not covered: algorithms with fewer multiplications (Winograd); oneDNN has none for training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.against import LARGE, LARGEST, SMALLER, SMALLEST
from bench.figures import Figure, Say
from bench.runs import BATCH, CLASSES, QUICK_BATCH
from switokd.models.registry import build

FIGURES: dict[str, tuple[tuple[str, ...], torch.dtype]] = {
    "plain_over_convolutions": ((LARGE,), torch.float32),
    "plain_over_convolutions_bf16": ((LARGE,), torch.bfloat16),
    "plain_over_convolutions_unequal": ((LARGEST, SMALLER, SMALLEST), torch.float32),
}
"""By figure: networks, and data type of their convolutions."""
SIDE = 32


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    rounds: int = 7
    repetitions: int = 5
    batch: int = BATCH
    matrix_side: int = 2048
    copied: int = 2**28
    """Bytes to copy: more than any cache holds."""


QUICK = Extent(1, 1, QUICK_BATCH, matrix_side=256, copied=2**24)
convolution_backward = torch.ops.aten.convolution_backward


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield the figures for fp32, for bf16 and for unequal networks."""
    for name, (networks, dtype) in FIGURES.items():
        say(f"a plain step of {', '.join(networks)} against its convolutions alone, {dtype}")
        yield _over_convolutions(name, networks, dtype, QUICK if quick else Extent())


def _over_convolutions(
    name: str, networks: Sequence[str], dtype: torch.dtype, extent: Extent
) -> Figure:
    def seconds_of(run: Callable[[], object]) -> float:
        return _seconds(run, extent.repetitions)

    plain = {network: plain_step(network, extent.batch) for network in networks}
    alone = {network: Convolutions.of(network, dtype, extent.batch) for network in networks}
    taken: dict[str, list[tuple[float, float]]] = {network: [] for network in networks}
    for _ in range(extent.rounds):
        for network, pairs in taken.items():
            pairs.append((seconds_of(plain[network]), seconds_of(alone[network].run)))
    by_round = zip(*taken.values(), strict=True)
    sums = [tuple(map(sum, zip(*pairs, strict=True))) for pairs in by_round]
    side = extent.matrix_side
    matrix = torch.randn(side, side).to(dtype)
    bytes_ = torch.ones(extent.copied, dtype=torch.uint8)
    other = torch.empty_like(bytes_)
    product = min(seconds_of(lambda: matrix @ matrix) for _ in range(extent.rounds))
    copy = min(seconds_of(lambda: other.copy_(bytes_)) for _ in range(extent.rounds))
    seconds = {
        n: [median(taken) for taken in zip(*pairs, strict=True)] for n, pairs in taken.items()
    }
    return Figure.of_pairs(
        name,
        [(a, b) for a, b in sums],
        what=f"a plain fp32 step over its convolutions alone, NHWC, {dtype}: upper bound of "
        "these kernels",
        details={
            "rows": [
                {
                    "network": network,
                    "plain_ms": 1000 * seconds[network][0],
                    "convolutions_ms": 1000 * seconds[network][1],
                    "gflops": alone[network].operations / seconds[network][1] / 1e9,
                    "outputs_mb": alone[network].bytes_made / 1e6,
                }
                for network in networks
            ],
            "batch_size": extent.batch,
            "threads": torch.get_num_threads(),
            "gflops_of_a_matrix_product": 2 * side**3 / product / 1e9,
            "gbytes_per_second_read_and_written": 2 * extent.copied / copy / 1e9,
        },
    )


def plain_step(name: str, batch: int = BATCH) -> Callable[[], None]:
    """Step of a single network in the plain loop."""
    network = build(name, 3, CLASSES)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    x, y = torch.randn(batch, 3, SIDE, SIDE), torch.randint(CLASSES, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


@dataclass(frozen=True)
class Convolutions:
    """All convolutions of a network, without the operations between them."""

    run: Callable[[], None]
    """Run forward and backward passes of all convolutions."""
    operations: float
    """Floating-point operations of `run`."""
    bytes_made: int
    """Bytes of all outputs in float32, which BatchNorm and ReLU must read."""

    @classmethod
    def of(cls, name: str, dtype: torch.dtype = torch.float32, batch: int = BATCH) -> Convolutions:
        """Convolutions of the network `name`, on a batch of noise."""
        network = build(name, 3, CLASSES).to(memory_format=torch.channels_last)
        layers: list[tuple[nn.Conv2d, Tensor, Tensor]] = []

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Conv2d)
            layers.append((layer, inputs[0].detach().to(dtype), torch.randn_like(output).to(dtype)))

        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(keep)
        x = torch.randn(batch, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            network(x)
        network = network.to(dtype)
        forward = [
            2 * g.numel() * layer.weight[0].numel() for layer, _, g in layers
        ]  # one multiplication and one addition per output and weight

        @torch.no_grad()
        def run() -> None:
            for i, (layer, x, g) in enumerate(layers):
                w, groups = layer.weight, layer.groups
                F.conv2d(x, w, None, layer.stride, layer.padding, layer.dilation, groups)
                sizes = layer.stride, layer.padding, layer.dilation, False, (0, 0), groups
                convolution_backward(g, x, w, None, *sizes, [i > 0, True, False])

        operations = 3 * sum(forward) - forward[0]  # the images need no gradient
        return cls(run, float(operations), sum(4 * g.numel() for _, _, g in layers))


def _seconds(run: Callable[[], object], repetitions: int) -> float:
    """Median seconds of so many calls, after one call to warm up."""
    taken = []
    for _ in range(1 + repetitions):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return median(taken[1:])
