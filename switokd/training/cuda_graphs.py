"""CUDA graphs: what a GPU does in a step, recorded once, then launched as a whole.

A GPU is done with a small network's hundreds of kernels sooner than the processor has launched
them one by one. A recording launches them all at once: the same kernels, on the same memory.

    Recording    a network's forward and backward
    Routines     functions of a few tensors: losses, distances, what is exchanged

So a recording holds for one size of batch, and only for what does the same every time and never
waits for the GPU. What it makes lies in the same memory every time, and is written over when it is
launched again. A network's gradients come all together, after backward: where it is on several
ranks, no sum travels beside it.

Not covered: several backward passes that share an update (each overwrites the gradients of the
last); SyncBatchNorm, whose ranks would have to record in step; collectives and updates.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from switokd.errors import UsageError, first_line

T = TypeVar("T")

WARM_UP = 3
"""Times that libraries are given to choose their kernels, and to take their memory."""

MAX_GRAPHS = 32
"""Forms that are kept of one's routines: a strategy's weights may be others in every step."""

_graph_memory: set[int] = set()
"""Where the memory of recordings' results begins: what others read there need not be copied."""


def refusal(what: str, error: Exception, remedy: str = "") -> Exception:
    """What to raise where a recording failed: a UsageError, or what says that memory ran out."""
    while isinstance(error.__context__, Exception):  # to end a recording that failed fails as well
        error = error.__context__
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return error
    usage = UsageError(
        f"compute.cuda_graphs: {what} cannot be recorded: {first_line(error)}; {remedy}use "
        "compute.cuda_graphs=false"
    )
    usage.seen_by_every_rank = False
    return usage


def can_capture(device: torch.device) -> bool:
    """Whether it has CUDA graphs."""
    return device.type == "cuda"


class GraphCapture:
    """Records what is launched on a GPU, on memory that nothing else takes.

    Recordings may share it if no two of them are in use at a time: a network's, of which only one
    is ever between forward and backward.
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

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
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


class GraphedModel:
    """One network's forward for batches as large as `x`, and its backward if it learns.

    compute: logits `[b, C]` of images `[b, ...]`, with their graph. parameters: those whose
    gradients backward gives; none where the network only answers. recorder: this network's.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        x: Tensor,
        capture: GraphCapture,
    ) -> None:
        self.capture = capture
        self._live: Tensor | None = None
        """What forward has made last, with PyTorch's own graph of it."""
        self._compute, self._parameters = compute, parameters
        self._x = torch.empty_like(x).copy_(x)
        self._dz = torch.zeros_like(capture.warm_up(self._forward))
        self._learns = torch.zeros((), requires_grad=bool(parameters))
        """Stands for the weights in PyTorch's graph: what depends on it has a backward pass."""
        if parameters:
            capture.warm_up(lambda: (self._forward(), self._backward()))
        self._z, self._replay_forward = capture.capture(self._forward)
        _register_memory(self, self._z)
        if parameters:
            self._gradients, self._replay_backward = capture.capture(self._backward)
        self._live = None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits; backward from them sets each parameter's `grad`, whatever it was."""
        z: Tensor = _Replay.apply(self._learns, x, self)
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Logits, without a graph."""
        self._x.copy_(x)
        self._replay_forward()
        return self._z.detach()  # one tensor cannot have every step's graph

    def backward(self, dz: Tensor) -> None:
        """Set the parameters' gradients, from that of the last logits."""
        self._dz.copy_(dz)
        self._replay_backward()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _forward(self) -> Tensor:
        self._live = None  # what an earlier one has kept for its backward pass goes first
        self._live = z = self._compute(self._x)
        return z.detach()

    def _backward(self) -> list[Tensor | None]:
        assert self._live is not None
        found = torch.autograd.grad(self._live, self._parameters, self._dz, allow_unused=True)
        return _own_memory(found, self._parameters)


class _Replay(torch.autograd.Function):
    """A recording's forward, with its backward as the graph behind it."""

    @staticmethod
    def forward(ctx: Any, learns: Tensor, x: Tensor, graphed: GraphedModel) -> Tensor:
        ctx.graphed = graphed
        return graphed.forward(x)

    @staticmethod
    def backward(ctx: Any, *dz: Tensor) -> tuple[None, None, None]:
        ctx.graphed.backward(*dz)
        return None, None, None


def _own_memory(
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


class GraphedFunctions:
    """Functions of tensors, each recorded the second time that it is called with such tensors."""

    def __init__(self, device: torch.device | None = None) -> None:
        """device: the GPU that the tensors are on; None: nothing is recorded."""
        self._device = device
        self._known: dict[Hashable, _GraphedFunction | None] = {}

    def __call__(self, key: Hashable, run: Callable[..., T], *given: Tensor) -> T:
        """What `run` makes of tensors: one or several, which the next call with `key` writes over.

        key: what `run` depends on beside tensors, and their shapes and types.
        """
        if self._device is None:
            return run(*given)
        form = key, *map(_cache_key, given)
        is_new, routine = form not in self._known, self._known.pop(form, None)
        if is_new:  # libraries load; what comes once only is not recorded
            if len(self._known) == MAX_GRAPHS:
                del self._known[next(iter(self._known))]  # what has not come for longest
            self._known[form] = None
            return run(*given)
        if routine is None:
            routine = self._capture(run, given, self._device)
        self._known[form] = routine
        made: T = routine(*given)
        return made

    def _capture(
        self, run: Callable[..., Any], given: Sequence[Tensor], device: torch.device
    ) -> _GraphedFunction:
        try:
            return _GraphedFunction(run, given, GraphCapture(device))
        except Exception as error:
            raise refusal("a step's losses, distances or exchange", error) from error

    def differentiable(
        self, key: Hashable, run: Callable[..., Tensor], z: Tensor, *given: Tensor
    ) -> Tensor:
        """The same for a scalar that has a gradient by z."""
        if self._device is None:
            return run(z, *given)

        def with_gradient(z: Tensor, *given: Tensor) -> list[Tensor]:
            leaf = z.requires_grad_()
            scalar = run(leaf, *given)
            return [scalar.detach(), *torch.autograd.grad(scalar, leaf)]

        scalar: Tensor = _Known.apply(z, *self(key, with_gradient, z.detach(), *given))
        return scalar


class _GraphedFunction:
    """One function, recorded on tensors of one form."""

    def __init__(self, run: Callable[..., Any], given: Sequence[Tensor], capture: GraphCapture):
        mine = [tensor if _is_graph_memory(tensor) else tensor.detach().clone() for tensor in given]
        self._copied = [(i, to) for i, to in enumerate(mine) if to is not given[i]]
        self._made, self._replay = capture.capture(lambda: run(*(t.detach() for t in mine)))
        _register_memory(self, *([self._made] if isinstance(self._made, Tensor) else self._made))

    def __call__(self, *given: Tensor) -> Any:
        for i, to in self._copied:
            to.copy_(given[i].detach())
        self._replay()
        return self._made


class _Known(torch.autograd.Function):
    """A scalar whose gradient by z is known."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scalar: Tensor, dz: Tensor) -> Tensor:
        ctx.dz = dz
        return scalar.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[0] * ctx.dz, None, None


def _cache_key(tensor: Tensor) -> Hashable:
    """What a recording on this tensor may be used for: such ones, or this one's memory."""
    place = (tensor.data_ptr(), tensor.stride()) if _is_graph_memory(tensor) else None
    return tensor.shape, tensor.dtype, place


def _is_graph_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _graph_memory


def _register_memory(owner: object, *made: Tensor) -> None:
    """Note where an owner has its results, for as long as it lives."""
    for begin in {tensor.untyped_storage().data_ptr() for tensor in made}:
        _graph_memory.add(begin)
        weakref.finalize(owner, _graph_memory.discard, begin)
