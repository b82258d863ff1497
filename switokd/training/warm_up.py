"""Compilation and CUDA graph capture before the first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from switokd.config.sections import Compute
from switokd.data.prefetch import in_order
from switokd.errors import UsageError, first_line
from switokd.training.cuda_graphs import (
    GraphCapture,
    GraphedModel,
    refusal,
)
from switokd.training.learner import Learner

MAX_COMPILED_FORMS = 64
"""That torch.compile may make of one class."""


def compiled(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as torch.compile makes it, anew for each of the few sizes that a shard has.

    PyTorch counts the forms of a class, not of a network, and leaves what is beyond the limit as it
    is: several networks of one class, each for whole batches and an epoch's last, need more.
    """
    from torch._dynamo import config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_COMPILED_FORMS)
    forward: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)
    return forward


def warm_up(learner: Learner, samples: int, shape: tuple[int, int, int], compute: Compute) -> None:
    """Do before the first step what it would take long for, with so many images.

    Statistics and random numbers stay as they are. UsageError if it cannot be done.
    """
    device = next(learner.model.parameters()).device
    if not (compute.compile or learner.is_graphed):
        return
    buffers = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        x = in_order(torch.randn(samples, *shape, device=device), compute.channels_last)
        if compute.compile:
            compile_ahead(learner, x)
        if learner.is_graphed:
            capture_ahead(learner, x)
    for name, buffer in learner.model.named_buffers():
        buffer.copy_(buffers[name])


def compile_ahead(learner: Learner, x: Tensor) -> None:
    """Compile forward and backward; UsageError if it fails, usually for want of a compiler."""
    from torch._inductor import config as inductor

    # PyTorch before 2.14 takes kernels from its cache whatever the number of threads in them.
    inductor.cpp.threads = torch.get_num_threads()
    try:
        z = learner.compute(x)
        if not learner.frozen:
            torch.autograd.grad(z.sum(), learner.gradients.parameters, allow_unused=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        usage = UsageError(
            f"compute.compile: torch.compile cannot compile {learner.name}: {first_line(error)}; a "
            "CPU needs a C++ compiler (g++), a GPU a C compiler (gcc), or use compute.compile=false"
        )
        usage.seen_by_every_rank = False
        raise usage from error


def capture_ahead(learner: Learner, x: Tensor) -> None:
    """Record forward and backward as CUDA graphs; UsageError if the network does not allow it."""
    parameters = [] if learner.frozen else learner.gradients.parameters
    compute = learner.eager().compute  # else each would keep the other
    earlier = next(iter(learner.graphed_models.values()), None)
    try:
        capture = earlier.capture if earlier else GraphCapture(x.device)
        learner.graphed_models[len(x)] = GraphedModel(compute, parameters, x, capture)
    except Exception as error:
        remedy = "its forward must do the same every time and read nothing from the GPU, or "
        raise refusal(learner.name, error, remedy) from error
