"""Networks by name: their sizes, what they take from the data, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from switokd.errors import UsageError
from switokd.models import build, check_output, parameter_count

MODULE = """\
import torch
from torch import nn

value = 3

def both(in_channels, num_classes):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 1), nn.Flatten(), nn.LazyLinear(num_classes))

def neither(features):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 10))

def no_network():
    return 3

def moody():
    raise ValueError("not today")
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a user's module that can be imported."""
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return "own_models"


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [("wrn-16-1", 10, "0.18"), ("wrn-16-2", 100, "0.70"), ("wrn-16-8", 10, "11.0")],
)
def test_wide_resnet_has_the_papers_size(name: str, classes: int, millions: str) -> None:
    decimals = len(millions.partition(".")[2])
    count = parameter_count(build(name, 3, classes))
    assert f"{count / 1e6:.{decimals}f}" == millions


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("wrn-10-1", 432 + 4_672 + 14_432 + 57_536 + 128 + 650),  # stem, blocks, BatchNorm, head
        ("mobilenet", 3_217_226),
        ("mobilenet-0.5", 823_722),
    ],
)
def test_parameter_count(name: str, count: int) -> None:
    assert parameter_count(build(name, 3, 10)) == count


@pytest.mark.parametrize("name", ["wrn-10-1", "mobilenet-0.25", "own_models:both"])
@pytest.mark.parametrize(("channels", "classes", "side"), [(1, 10, 8), (3, 100, 32), (4, 7, 28)])
def test_channels_and_classes_come_from_the_data(
    own_models: str, name: str, channels: int, classes: int, side: int
) -> None:
    network = build(name, channels, classes)
    check_output(network, name, (channels, side, side), classes)
    assert network(torch.rand(3, channels, side, side)).shape == (3, classes)


def test_parameter_count_leaves_out_what_is_not_trained() -> None:
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    assert parameter_count(network) == 6


@pytest.mark.parametrize(
    ("name", "shape"), [("wrn-10-2", (128, 8, 8)), ("mobilenet-0.5", (512, 2, 2))]
)
def test_last_feature_map_of_an_image_of_32_by_32(name: str, shape: tuple[int, ...]) -> None:
    *body, _head = build(name, 3, 10).children()
    x = torch.rand(2, 3, 32, 32)
    for part in body:
        x = part(x)
    assert x.shape[1:] == shape


def test_run_files_arguments_win_over_the_datas() -> None:
    assert build("wrn-10-1", 3, 10, {"num_classes": 5})(torch.rand(2, 3, 8, 8)).shape == (2, 5)


def test_own_callable_need_not_take_channels_and_classes(own_models: str) -> None:
    network = build("own_models:neither", 1, 10, {"features": 64})
    check_output(network, "own_models:neither", (1, 8, 8), 10)


def test_torchvisions_network_by_name() -> None:
    network = build("resnet18", 3, 7)
    check_output(network, "resnet18", (3, 32, 32), 7)
    assert parameter_count(network) == 11_180_103


@pytest.mark.parametrize(
    ("name", "kwargs", "sentence"),
    [
        ("mobilnet", {}, "no model 'mobilnet'; did you mean 'mobilenet'? (allowed: wrn-DEPTH-W"),
        ("resnet19", {}, "no model 'resnet19'; did you mean 'resnet18'?"),
        ("wrn-16", {}, "no model 'wrn-16'"),
        ("wrn-15-2", {}, "depth must be 10, 16, 22, 28, ... and width 1 or more, got 15-2"),
        ("wrn-16-0", {}, "got 16-0"),
        ("mobilenet-0", {}, "width must be above 0, got 0.0"),
        ("wrn-16-2", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("resnet18", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("no_such.part:net", {}, "there is no module 'no_such'"),
        ("own_models.part:net", {}, "there is no module 'own_models.part'"),
        ("own_models:absent", {}, "'absent' is not there in module own_models"),
        ("own_models:", {}, "own_models:: write package.module:callable"),
        (":x", {}, ":x: write package.module:callable"),
        ("resnet18", {"weights": "nope"}, "cannot be made"),
        ("own_models:value", {}, "'value' is not callable in module own_models"),
        ("own_models:no_network", {}, "must return a torch.nn.Module, got int"),
        ("own_models:neither", {}, "missing 1 required positional argument: 'features'"),
        ("own_models:moody", {}, "own_models:moody cannot be made with {}: not today"),
    ],
)
def test_bad_model_is_refused_in_one_line(
    own_models: str, name: str, kwargs: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build(name, 1, 10, kwargs)
    message = str(caught.value)
    assert sentence in message
    assert name in message
    assert "\n" not in message


def test_fault_inside_the_users_module_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        build("needs_more:net", 1, 10)


@pytest.mark.parametrize(
    ("network", "image", "sentence"),
    [
        (nn.Flatten(), (1, 8, 8), "must turn 2 images into logits of shape (2, 10), got (2, 64)"),
        (nn.MaxPool2d(2, return_indices=True), (1, 8, 8), "of shape (2, 10), got tuple"),
        (nn.Conv2d(3, 1, 1), (1, 8, 8), "does not take images of 1 x 8 x 8 (channels, height"),
    ],
)
def test_wrong_output_is_refused(
    network: nn.Module, image: tuple[int, int, int], sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_output(network, "mine", image, 10)
    assert str(caught.value).startswith("model mine ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("training", [True, False])
def test_check_leaves_the_network_as_it_was(training: bool) -> None:
    network = build("wrn-10-1", 1, 10).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert any("running_mean" in name for name in before)
    check_output(network, "wrn-10-1", (1, 8, 8), 10)
    assert network.training is training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
