"""What is compiled before the first step is all that a training needs.

Not covered: GPUs.
"""

from __future__ import annotations

import pytest
import torch

from bench.in_process import ONE_PROCESS, InProcess
from switokd.config import Config

NAMES = ("t1", "t2", "t3", "t4", "s")


class Flat(torch.nn.Linear):
    """The smallest network; of PyTorch's forms of its class there are two for each network."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(1))


@pytest.mark.timeout(180)
def test_no_step_compiles_anything_not_even_an_epochs_last(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate(
        {
            **ONE_PROCESS,
            "name": "compiled",
            "device": "cpu",
            "data": {"dataset": "digits", "batch_size": 8, "train_samples": 12, "drop_last": False},
            "networks": {
                name: {"role": "student" if name == "s" else "teacher", "model": f"{__name__}:Flat"}
                for name in NAMES
            },
            "compute": {"compile": True},
            "schedule": {"epochs": 2},
        }
    )
    torch.compiler.reset()
    ours = InProcess(config)
    monkeypatch.setattr("torch._dynamo.config.error_on_recompile", True)
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    with torch.compiler.set_stance("fail_on_recompile"):
        sizes = [len(ours.step(x, y).y) for x, y in ours.batches(4)]
    assert sizes == [8, 4, 8, 4]
    assert torch._dynamo.config.recompile_limit >= 2 * len(NAMES)
