"""Values that are not finite end a run before they reach a weight, and their source is named.

Not covered: logits, which `test_exchange.py` and `test_faults.py` look at; GPUs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from switokd.config.run_file import load_importable
from switokd.errors import NonFiniteError
from switokd.runs.checkpoints import stored
from switokd.runtime.environment import Environment
from switokd.training.optimizer import check_gradients
from switokd.worker import train

OWN = """
import torch
from torch import nn
from torch.utils.data import Dataset

class Steep(nn.Module):
    '''Its gradient is not finite in the fourth step; its logits are.'''

    steps = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        z = self.layer(x.flatten(1))
        if self.training and z.requires_grad:
            self.steps += 1
            if self.steps == 4:
                z = z + (z - z.detach()).abs().sqrt() * 1e-3
        return z

class Images(Dataset):
    def __init__(self, bad=()):
        self.bad = set(bad)

    def __len__(self):
        return 60

    def __getitem__(self, i):
        x = torch.full((1, 8, 8), float(i % 10))
        if i in self.bad:
            x[0, 2, 2] = float("nan")
        return x, i % 10

def data(train):
    return Images([17, 41] if train else [])
"""


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def failure(*settings: str) -> str:
    """Train in this process; return the message of the NonFiniteError."""
    usual = ["placement=replicated", "coordinator=off", "run_dir=out", "schedule.max_steps=9"]
    config = load_importable("digits-1t1s", [*usual, *settings])
    with pytest.raises(NonFiniteError) as caught:
        train(config, Environment())
    return str(caught.value)


def test_a_gradient_that_is_not_finite_is_not_applied() -> None:
    models = [f"networks.{name}.model=own:Steep" for name in ("teacher", "student")]
    message = failure(*models, "checkpoint.every_steps=1", "distillation.strategy=vanilla")
    assert "network student has a gradient that is not finite at step 4" in message
    checkpoint = stored(Path("out"))[0]
    assert checkpoint.step == 3
    state, _ = checkpoint.read()
    for part in state["ranks"][0]["shared"].values():
        assert all(value.isfinite().all() for value in part["model"].values())


def test_images_that_are_not_finite_are_named_instead_of_the_learning_rate() -> None:
    models = [f"networks.{name}.model=tests.sleepers:Flat" for name in ("teacher", "student")]
    message = failure(*models, "data.dataset=own:data", "data.batch_size=60")
    assert "have values that are not finite (used at step 1, which was not applied)" in message
    assert "training images 17, 41 " in message or "training images 41, 17 " in message
    assert "optimizer.lr" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_among_many_is_found(value: float) -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 1000)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3e38)
    check_gradients(parameters, "s", 7)  # the sum overflows, and no gradient does
    assert parameters[1].grad is not None
    parameters[1].grad[-1] = value
    with pytest.raises(NonFiniteError, match=r"network s has a gradient .* at step 7; it was not"):
        check_gradients(parameters, "s", 7)
