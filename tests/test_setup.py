"""What is compiled before the first step is all that a training needs.

Not covered: GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.in_process import ONE_PROCESS, InProcess
from switokd.config import Config
from switokd.errors import UsageError
from switokd.setup import compile_ahead

NAMES = ("t1", "t2", "t3", "t4", "s")  # each in two forms: more than PyTorch's limit for a class
RUN_FILE: dict[str, Any] = {
    **ONE_PROCESS,
    "name": "compiled",
    "device": "cpu",
    "data": {"dataset": "digits", "batch_size": 8, "train_samples": 12, "drop_last": False},
    "networks": {
        name: {"role": "student" if name == "s" else "teacher", "model": "tests.sleepers:Flat"}
        for name in NAMES
    },
    "compute": {"compile": True},
    "schedule": {"epochs": 2},
}


@pytest.mark.timeout(180)
def test_no_step_compiles_anything_not_even_an_epochs_last() -> None:
    config = Config.model_validate(RUN_FILE)
    torch.compiler.reset()
    ours = InProcess(config)
    strict = {"error_on_recompile": True, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(strict), torch.compiler.set_stance("fail_on_recompile"):
        sizes = [len(ours.step(x, y).y) for x, y in ours.batches(4)]
    assert sizes == [8, 4, 8, 4]
    assert torch._dynamo.config.recompile_limit >= 2 * len(NAMES)


def test_a_gpu_without_memory_left_is_not_taken_for_a_compiler_that_is_missing() -> None:
    """A profile leaves the size out then, and a training says what it is."""
    config = Config.model_validate({**RUN_FILE, "compute": {"compile": False}})
    learner = InProcess(config).learners[0]

    def full(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no g++")

    with pytest.raises(torch.OutOfMemoryError):
        compile_ahead(replace(learner, network=full), 2, (1, 8, 8), True)
    with pytest.raises(UsageError, match=r"cannot compile t1: no g\+\+; a CPU needs"):
        compile_ahead(replace(learner, network=broken), 2, (1, 8, 8), True)
