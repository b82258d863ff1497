"""Parameters and multiply-adds equal counts by hand and the numbers that torchvision states.

Not covered: the networks themselves (`test_registry.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torchvision

from switokd.errors import OwnCodeError, UsageError
from switokd.models.flops import size_of

MODULE = """\
from torch import nn

def grouped(num_classes):
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )

class Transformer(nn.Module):
    def __init__(self, num_classes, reads_values):
        super().__init__()
        self.reads_values = reads_values
        self.layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):  # a token is a row of pixels
        if self.reads_values and x.sum().item() > 1:
            return x
        return self.head(self.layer(x.flatten(1, 2)).mean(dim=1))

def no_logits():
    return nn.Flatten()

def broken():
    raise OSError("not here")
"""


@pytest.fixture
def own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a user's module that can be imported."""
    (tmp_path / "own_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return "own_networks"


@pytest.mark.parametrize(
    "name",
    ["resnet34", "mobilenet_v2", "resnext50_32x4d", "shufflenet_v2_x1_0", "vgg11", "vit_b_16"],
)
def test_size_equals_the_one_torchvision_states(name: str) -> None:
    stated = torchvision.models.get_model_weights(name).DEFAULT.meta
    size = size_of(name, (3, 224, 224), 1000)
    assert size.parameters == stated["num_params"]
    assert size.multiply_adds / 1e9 == pytest.approx(stated["_ops"], abs=0.0006)


def test_grouped_convolution_counts_its_own_products(own_networks: str) -> None:
    size = size_of(f"{own_networks}:grouped", (4, 10, 6), 7)
    assert size.multiply_adds == (8 * 5 * 3) * 9 + 8 * 7
    assert size.parameters == 8 * 9 + 16 + 8 * 7 + 7


@pytest.mark.parametrize("reads_values", [False, True])
def test_attention_counts_also_if_the_network_reads_values(
    own_networks: str, reads_values: bool
) -> None:
    kwargs = {"reads_values": reads_values}
    size = size_of(f"{own_networks}:Transformer", (2, 3, 8), 5, kwargs)
    tokens, width, hidden = 6, 8, 16
    projections = 4 * tokens * width * width
    attention = 2 * tokens * tokens * width
    assert size.multiply_adds == projections + attention + 2 * tokens * width * hidden + width * 5


def test_counting_changes_no_global_state() -> None:
    state, was_fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    size_of("wrn-10-1", (3, 8, 8), 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() == was_fast
    assert torch.zeros(1).device.type == "cpu"


def test_larger_images_need_more_arithmetic_not_parameters() -> None:
    small, large = (size_of("wrn-16-2", (3, side, side), 10) for side in (32, 64))
    assert small.parameters == large.parameters
    head = 128 * 10
    assert large.multiply_adds - head == 4 * (small.multiply_adds - head)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet-19", "depth must be one of 18"),
        ("own_networks:no_logits", "must turn 2 images into logits of shape (2, 10), got (2, 192)"),
        ("own_networks:grouped", "does not take images of 3 x 8 x 8"),
    ],
)
def test_message_for_an_invalid_network(own_networks: str, name: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        size_of(name, (3, 8, 8), 10)
    assert sentence in str(caught.value)
    assert name in str(caught.value)


def test_error_in_the_users_module_is_one_line(own_networks: str) -> None:
    with pytest.raises(OwnCodeError, match=r"cannot be made with .*OSError: not here"):
        size_of(f"{own_networks}:broken", (3, 8, 8), 10)
