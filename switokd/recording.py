"""A network's forward and backward as CUDA graphs: recorded once, then launched as a whole.

A GPU is done with a small network's hundreds of kernels sooner than the processor has launched
them one by one. A recording launches them all at once: the same kernels, on the same memory.

So it holds for one size of batch, and only for a network that does the same every time and never
waits for the GPU. Gradients come all together, after backward: where a network is on several
ranks, no sum travels beside it.

Not covered: several backward passes that share an update (each overwrites the gradients of the
last); SyncBatchNorm, whose ranks would have to record in step; loss, exchange and update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

WARM_UP = 3
"""Times that libraries are given to choose their kernels, and to take their memory."""


def can_record(device: torch.device) -> bool:
    """Whether it has CUDA graphs."""
    return device.type == "cuda"


class Recorder:
    """Records what is launched on a GPU, on memory that nothing else takes.

    A network's recordings share it: only one of them may be between forward and backward.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], T]) -> T:
        """Run it some times as it will be recorded; what the last time gave."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP - 1):
                run()
            made = run()
        current.wait_stream(self._stream)
        return made

    def record(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What `run` makes, and what makes it anew in the same memory."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # NCCL's thread may go on asking the GPU
        ):
            made = run()
        return made, graph.replay


class Recording:
    """One network's forward for batches as large as `x`, and its backward if it learns.

    compute: logits `[b, C]` of images `[b, ...]`, with their graph. parameters: those whose
    gradients backward gives; none where the network only answers. recorder: this network's.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        x: Tensor,
        recorder: Recorder,
    ) -> None:
        self.recorder = recorder
        self._compute, self._parameters = compute, parameters
        self._x = torch.empty_like(x).copy_(x)
        self._dz = torch.zeros_like(recorder.warm_up(self._forward))
        self._learns = torch.zeros((), requires_grad=bool(parameters))
        """Stands for the weights in PyTorch's graph: what depends on it has a backward pass."""
        if parameters:
            recorder.warm_up(lambda: (self._forward(), self._backward()))
        self._z, self._replay_forward = recorder.record(self._forward)
        if parameters:
            self._gradients, self._replay_backward = recorder.record(self._backward)
        del self._live  # PyTorch's own graph of it

    def __call__(self, x: Tensor) -> Tensor:
        """Logits; backward from them sets each parameter's `grad`, whatever it was."""
        z: Tensor = _Replayed.apply(self._learns, x, self)
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Logits, without a graph."""
        self._x.copy_(x)
        self._replay_forward()
        return self._z.clone()  # the next batch's are written over them

    def backward(self, dz: Tensor) -> None:
        """Set the parameters' gradients, from that of the last logits."""
        self._dz.copy_(dz)
        self._replay_backward()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _forward(self) -> Tensor:
        self._live = self._compute(self._x)
        return self._live.detach()

    def _backward(self) -> list[Tensor | None]:
        found = torch.autograd.grad(self._live, self._parameters, self._dz, allow_unused=True)
        return _each_its_own(found, self._parameters)


class _Replayed(torch.autograd.Function):
    """A recording's forward, with its backward as the graph behind it."""

    @staticmethod
    def forward(ctx: Any, learns: Tensor, x: Tensor, recording: Recording) -> Tensor:
        ctx.recording = recording
        return recording.forward(x)

    @staticmethod
    def backward(ctx: Any, *dz: Tensor) -> tuple[None, None, None]:
        ctx.recording.backward(*dz)
        return None, None, None


def _each_its_own(
    gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """As PyTorch leaves them in `grad`: in the memory order of their parameters, which fused
    optimizers need, and no two in one memory, though parameters that are added up have the same.
    """
    found: list[Tensor | None] = []
    taken = set()
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            memory = gradient.untyped_storage().data_ptr()
            if gradient.stride() != parameter.stride() or memory in taken:
                gradient = torch.empty_like(parameter).copy_(gradient)
            taken.add(memory)
        found.append(gradient)
    return found
