"""CUDA graphs of networks that change their input, or draw from the generators of Python and numpy.

Not covered: capturing on a GPU (`test_gpu.py`); other networks (`test_cuda_graphs.py`).
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from torch import Tensor

from bench.in_process import InProcess
from switokd.config.config import Config
from switokd.errors import UsageError
from tests.training.test_cuda_graphs import RUN_FILE, Net, Rerun, Trained, assert_same


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat PyTorch's calls instead of kernels."""
    monkeypatch.setattr("switokd.training.build.can_capture", lambda device: True)
    monkeypatch.setattr("switokd.training.cuda_graphs.GraphCapture", Rerun)


class Changes(Net):
    """Changes its input in place; a graph does that to the memory that it owns."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


def test_a_captured_network_may_change_its_input() -> None:
    changes = {"model": "tests.training.test_graphed_user_code:Changes"}
    networks = {name: {**given, **changes} for name, given in RUN_FILE["networks"].items()}
    for some in (networks, {**networks, "s": RUN_FILE["networks"]["s"]}):
        assert_same(Trained(True, networks=some), Trained(False, networks=some))


class Draws(Net):
    """Draws from a generator whose numbers a graph would repeat."""

    def __init__(self, generator: str) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (
            random.random() if self.generator == "Python" else np.random.rand()
        )


@pytest.mark.parametrize("generator", ["Python", "numpy"])
def test_a_network_whose_draws_a_graph_would_repeat_is_refused(generator: str) -> None:
    draws = {
        "model": "tests.training.test_graphed_user_code:Draws",
        "model_kwargs": {"generator": generator},
    }
    networks = {**RUN_FILE["networks"], "s": {**RUN_FILE["networks"]["s"], **draws}}
    raw = {**RUN_FILE, "networks": networks, "compute": {"cuda_graphs": True}}
    with pytest.raises(
        UsageError, match=r"s cannot be captured: it draws from the generator of Py"
    ):
        InProcess(Config.model_validate(raw))
