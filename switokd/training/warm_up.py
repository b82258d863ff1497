"""Compilation and CUDA graph capture before the first step."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from switokd.config.sections import Compute
from switokd.data.augment import seeding
from switokd.data.prefetch import in_order
from switokd.errors import SwitokdError, UsageError, first_line, own_code_error
from switokd.models.outputs import leave_uncompiled
from switokd.runtime.waiting import waiting
from switokd.training.cuda_graphs import capture_error
from switokd.training.learner import Learner

RECOMPILE_LIMIT = 64
"""How often torch.compile may compile one class."""


def compile_model(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model's compiled form, which compiles again for each shard size.

    PyTorch counts compilations by class, not by network, and runs eagerly above its limit. Several
    networks of one class, each with full batches and an epoch's last batch, need a higher limit.
    """
    from torch._dynamo import config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    leave_uncompiled(model)
    forward: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)
    return forward


def warm_up(learner: Learner, samples: int, shape: tuple[int, int, int], compute: Compute) -> None:
    """Compile and capture a network for batches of `samples` images of `shape`.

    Buffers (BatchNorm statistics) and random generators stay unchanged. UsageError if compiling
    or capturing fails.
    """
    device = next(learner.model.parameters()).device
    if not (compute.compile or learner.graphs.captures_model):
        return
    buffers = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
    gpus = [device] if device.type == "cuda" else []
    what = "torch.compile" if compute.compile else "the capture of CUDA graphs"
    says = waiting(f"{what}: {learner.name}, batches of {samples} images")
    with seeding(), torch.random.fork_rng(devices=gpus), says:
        x = in_order(torch.randn(samples, *shape, device=device), compute.channels_last)
        if compute.compile:
            compile_ahead(learner, x)
        if learner.graphs.captures_model:
            capture_ahead(learner, x)
    for name, buffer in learner.model.named_buffers():
        buffer.copy_(buffers[name])


def compile_ahead(learner: Learner, x: Tensor) -> None:
    """Compile forward and backward; UsageError if that fails, usually for want of a compiler."""
    from torch._inductor import config as inductor

    # PyTorch before 2.14 reuses cached kernels that were compiled for another number of threads.
    inductor.cpp.threads = torch.get_num_threads()
    try:
        z = learner.forward_pass(x)
        if not learner.frozen:
            torch.autograd.grad(z.sum(), learner.parameters, allow_unused=True)
    except (SwitokdError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        found = own_code_error(error, f"network {learner.name}")
        if found and not type(error).__module__.startswith("torch."):  # those of the compiler
            raise found from error
        raise UsageError(
            f"compute.compile: torch.compile cannot compile {learner.name}: {first_line(error)}; "
            "a CPU needs a C++ compiler (g++), a GPU a C compiler (gcc), or use "
            "compute.compile=false",
            every_rank=False,
        ) from error


def capture_ahead(learner: Learner, x: Tensor) -> None:
    """Capture forward and backward as CUDA graphs; UsageError if the network does not allow it.

    A graph would repeat what forward has drawn from the generators of Python and numpy.
    """
    try:
        parameters = [] if learner.frozen else learner.parameters
        with seeding() as seed:
            seed(0)
            before = random.getstate(), np.random.random_sample()
            seed(0)
            learner.graphs.capture(learner.forward_pass, parameters, x)
            after = random.getstate(), np.random.random_sample()
        if before != after:
            raise RuntimeError("it draws from the generator of Python or numpy")
    except Exception as error:
        remedy = "its forward must do the same every time and read nothing from the GPU, or "
        raise capture_error(learner.name, error, remedy) from error
