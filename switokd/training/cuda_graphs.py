"""CUDA graphs: the work of a step on a GPU, captured once and then replayed as a whole.

A GPU finishes a small network's hundreds of kernels faster than the CPU can launch them one by
one. Replaying a graph launches all of them at once: the same kernels, on the same memory.

    GraphedModel        forward and backward of one network, for one batch size
    GraphedFunctions    functions of a few tensors: losses, distances, the exchange's packing

A graph is valid for one batch size, and only for work that is the same in every step and never
waits for the GPU. A graph's results lie in the same memory every time, and the next replay
overwrites them. A graphed network's gradients are all ready at the same time, after backward, so
a network on several ranks cannot overlap their all_reduce with its backward.

Not covered: several backward passes that share an optimizer step (each would overwrite the
gradients of the last); SyncBatchNorm, whose ranks would have to capture in the same order;
collectives and optimizer steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from switokd.errors import UsageError, first_line

T = TypeVar("T")

WARM_UP_RUNS = 3
"""Runs before a capture, in which libraries choose their kernels and allocate memory."""

MAX_GRAPHS = 32
"""Maximum number of cached graphs of one GraphedFunctions: weights may change in every step."""


def capture_error(name: str, error: Exception, remedy: str = "") -> Exception:
    """Return the error to raise after a failed capture of `name`.

    An OutOfMemoryError is returned unchanged; any other error becomes a UsageError. remedy: other
    advice, which the message gives before "use compute.cuda_graphs=false"; ends with ", or ".
    """
    # A failed capture raises a second error, whose context is the error with the cause.
    while isinstance(error.__context__, Exception):
        error = error.__context__
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return error
    return UsageError(
        f"compute.cuda_graphs: {name} cannot be captured: {first_line(error)}; {remedy}use "
        "compute.cuda_graphs=false",
        every_rank=False,
    )


def can_capture(device: torch.device) -> bool:
    """Return whether `device` supports CUDA graphs."""
    return device.type == "cuda"


class GraphContext:
    """The device on which a rank captures CUDA graphs, and the memory that these graphs own.

    device: the GPU; None: nothing is captured.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._addresses: set[int] = set()

    def register(self, owner: object, *results: Tensor) -> None:
        """Note that graphs own the memory of `results`, as long as `owner` lives."""
        for address in {tensor.untyped_storage().data_ptr() for tensor in results}:
            self._addresses.add(address)
            weakref.finalize(owner, self._addresses.discard, address)

    def owns(self, tensor: Tensor) -> bool:
        """Return whether a graph owns the memory of `tensor`, so that others need no copy."""
        return tensor.untyped_storage().data_ptr() in self._addresses

    def cache_key(self, tensor: Tensor) -> Hashable:
        """Return shape and dtype, and address and strides if a graph owns the memory."""
        memory = (tensor.data_ptr(), tensor.stride()) if self.owns(tensor) else None
        return tensor.shape, tensor.dtype, memory


class GraphCapture:
    """Captures the kernels that a function launches, with a memory pool of their own.

    Graphs may share the pool if at most one of them is in use at a time. The graphs of one network
    meet this condition, because only one of them is ever between forward and backward.
    """

    def __init__(self, context: GraphContext) -> None:
        self.context = context
        self._stream = torch.cuda.Stream(context.device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], T]) -> T:
        """Run the function several times on the capture's stream; return the last result."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_RUNS - 1):
                run()
            result = run()
        current.wait_stream(self._stream)
        return result

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Return the result of `run`, and a function that computes it again in the same memory."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # NCCL's thread may query the GPU meanwhile
        ):
            result = run()
        return result, graph.replay


class GraphedModel:
    """One network's forward for batches of the size of `x`, and its backward if it learns.

    compute: maps images `[b, ...]` to logits `[b, C]` with an autograd graph. parameters: those
    that backward computes gradients for; empty for a frozen network. capture: shared by all graphs
    of this network.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        x: Tensor,
        capture: GraphCapture,
    ) -> None:
        self._live: Tensor | None = None
        """The logits of the last forward pass, with PyTorch's autograd graph."""
        self._compute, self._parameters = compute, parameters
        self._x = torch.empty_like(x).copy_(x)
        self._dz = torch.zeros_like(capture.warm_up(self._forward))
        self._learns = torch.zeros((), requires_grad=bool(parameters))
        """Stands for the weights in autograd: a result that depends on it has a backward pass."""
        if parameters:
            capture.warm_up(lambda: (self._forward(), self._backward()))
        self._z, self._replay_forward = capture.capture(self._forward)
        capture.context.register(self, self._z)
        if parameters:
            self._gradients, self._replay_backward = capture.capture(self._backward)
        self._live = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits `[b, C]`; their backward overwrites the `grad` of each parameter."""
        z: Tensor = _Replay.apply(self._learns, x, self)
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[b, C]` without an autograd graph."""
        self._x.copy_(x)
        self._replay_forward()
        return self._z.detach()  # a new tensor, because each step has its own autograd graph

    def backward(self, dz: Tensor) -> None:
        """Set the parameters' gradients, given the gradient `[b, C]` of the last logits."""
        self._dz.copy_(dz)
        self._replay_backward()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _forward(self) -> Tensor:
        self._live = None  # free the activations of the last forward pass first
        self._live = z = self._compute(self._x)
        return z.detach()

    def _backward(self) -> list[Tensor | None]:
        assert self._live is not None
        gradients = torch.autograd.grad(self._live, self._parameters, self._dz, allow_unused=True)
        return _separate_memory(gradients, self._parameters)


class _Replay(torch.autograd.Function):
    """Replays a captured forward; autograd replays the captured backward."""

    @staticmethod
    def forward(ctx: Any, learns: Tensor, x: Tensor, graphed: GraphedModel) -> Tensor:
        ctx.graphed = graphed
        return graphed.forward(x)

    @staticmethod
    def backward(ctx: Any, *dz: Tensor) -> tuple[None, None, None]:
        ctx.graphed.backward(*dz)
        return None, None, None


def _separate_memory(
    gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """Return gradients as PyTorch stores them in `grad`.

    Each has the strides of its parameter, which fused optimizers require. No two share memory,
    although autograd returns one tensor for parameters that the model adds up.
    """
    separate: list[Tensor | None] = []
    used = set()
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            address = gradient.untyped_storage().data_ptr()
            if gradient.stride() != parameter.stride() or address in used:
                gradient = torch.empty_like(parameter).copy_(gradient)
            used.add(address)
        separate.append(gradient)
    return separate


class GraphedFunctions:
    """Functions of tensors, each captured at its second call with tensors of the same form."""

    def __init__(self, context: GraphContext | None = None) -> None:
        self._context = context or GraphContext()
        self._graphs: dict[Hashable, _GraphedFunction | None] = {}
        """By cache key, least recently used first; None after the first call."""

    def __call__(self, key: Hashable, run: Callable[..., T], *inputs: Tensor) -> T:
        """Return `run(*inputs)`: one tensor or several; the next call with `key` overwrites them.

        key: everything that `run` depends on except the tensors, their shapes and their dtypes.
        """
        if self._context.device is None:
            return run(*inputs)
        cache_key = key, *map(self._context.cache_key, inputs)
        is_first, graph = cache_key not in self._graphs, self._graphs.pop(cache_key, None)
        if is_first:  # libraries load their kernels; a function called once needs no graph
            if len(self._graphs) == MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[cache_key] = None
            return run(*inputs)
        if graph is None:
            graph = self._capture(run, inputs)
        self._graphs[cache_key] = graph
        results: T = graph(*inputs)
        return results

    def _capture(self, run: Callable[..., Any], inputs: Sequence[Tensor]) -> _GraphedFunction:
        try:
            return _GraphedFunction(run, inputs, GraphCapture(self._context))
        except Exception as error:
            raise capture_error("a step's losses, distances or exchange", error) from error

    def differentiable(
        self, key: Hashable, run: Callable[..., Tensor], z: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Return the scalar `run(z, *inputs)`, through which autograd reaches z; see `__call__`."""
        if self._context.device is None:
            return run(z, *inputs)

        def with_gradient(z: Tensor, *inputs: Tensor) -> list[Tensor]:
            leaf = z.requires_grad_()
            scalar = run(leaf, *inputs)
            return [scalar.detach(), *torch.autograd.grad(scalar, leaf)]

        results = self(key, with_gradient, z.detach(), *inputs)
        scalar: Tensor = _ScalarWithGradient.apply(z, *results)
        return scalar


class _GraphedFunction:
    """One function, captured for input tensors of one form."""

    def __init__(self, run: Callable[..., Any], inputs: Sequence[Tensor], capture: GraphCapture):
        owns = capture.context.owns
        static = [tensor if owns(tensor) else tensor.detach().clone() for tensor in inputs]
        self._copied = [(i, copy) for i, copy in enumerate(static) if copy is not inputs[i]]
        """Positions of the inputs that are copied into the graph's memory, and this memory."""
        self._results, self._replay = capture.capture(lambda: run(*(t.detach() for t in static)))
        is_single = isinstance(self._results, Tensor)
        capture.context.register(self, *([self._results] if is_single else self._results))

    def __call__(self, *inputs: Tensor) -> Any:
        for i, copy in self._copied:
            copy.copy_(inputs[i].detach())
        self._replay()
        return self._results


class _ScalarWithGradient(torch.autograd.Function):
    """Makes a scalar depend on z in autograd; the gradient dz is given, not computed."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scalar: Tensor, dz: Tensor) -> Tensor:
        ctx.dz = dz
        return scalar.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[0] * ctx.dz, None, None


class NetworkGraphs:
    """The CUDA graphs of one network: its forward and backward by batch size, and its losses.

    captures_model: whether `capture` is to be called for the network's batch sizes before training.
    """

    def __init__(self, context: GraphContext | None = None, captures_model: bool = False) -> None:
        self._context = context or GraphContext()
        self.captures_model = captures_model
        self.functions = GraphedFunctions(context)
        """Captures the network's losses."""
        self._models: dict[int, GraphedModel] = {}
        self._model_capture: GraphCapture | None = None

    @property
    def batch_sizes(self) -> list[int]:
        """Batch sizes for which the network was captured, ascending."""
        return sorted(self._models)

    def model(self, batch_size: int) -> GraphedModel | None:
        """Return the graph for one batch size; None if there is no graph for this size."""
        return self._models.get(batch_size)

    def capture(
        self, compute: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], x: Tensor
    ) -> None:
        """Capture the network for batches of the size of `x`; see `GraphedModel`."""
        if self._model_capture is None:
            self._model_capture = GraphCapture(self._context)
        self._models[len(x)] = GraphedModel(compute, parameters, x, self._model_capture)
