"""Networks by name: their sizes, their arguments from the data, and errors for invalid names.

Not covered: training them (`tests/training`).
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from switokd.config.run_file import load
from switokd.data.images import open_images
from switokd.errors import UsageError
from switokd.models.paper import PAPER_NETWORKS
from switokd.models.registry import build, check_output, parameter_count
from switokd.models.resnet import BasicBlock, CifarResNet
from switokd.training.build import make_model
from tests.support import run

MODULE = """\
import random
import numpy as np
import torch
from torch import nn

value = 3

def drawn(num_classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    with torch.no_grad():
        network[1].weight[0] = float(np.random.rand())
        network[1].weight[1] = random.random()
    return network

def both(in_channels, num_classes):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 1), nn.Flatten(), nn.LazyLinear(num_classes))

def neither(features):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 10))

def no_network():
    return 3

def moody():
    raise ValueError("not today")

def sized(image_size, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, num_classes))
"""

TABLES = {  # network, classes: parameters, and the millions of parameters that the paper prints
    ("wrn-16-1", 10): (175_066, "0.18"),
    ("wrn-16-8", 10): (10_961_370, "11.0"),
    ("mobilenetv2-0.5", 100): (812_548, "0.81"),
    ("wrn-16-2", 100): (703_284, "0.70"),
    ("resnet-20", 200): (282_072, "0.28"),
    ("wrn-16-2", 200): (716_184, "0.72"),
    ("mobilenetv2-1.4", 200): (4_674_376, "4.7"),
    # Table 4 prints 21.3, truncated instead of rounded. The network in the authors' code has the
    # same number of parameters.
    ("resnet-34", 200): (21_379_592, "21.4"),
    ("mobilenet", 100): (3_309_476, None),  # table 7 prints no numbers of parameters
    ("wrn-16-10", 100): (17_174_324, None),
    ("resnet18", 1000): (11_689_512, None),
    ("resnet34", 1000): (21_797_672, None),
}


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an importable module with a user's networks."""
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return "own_models"


@pytest.mark.parametrize(("name", "classes"), TABLES)
def test_networks_have_the_papers_sizes(name: str, classes: int) -> None:
    count, printed = TABLES[name, classes]
    with torch.device("meta"):
        assert parameter_count(build(name, 3, classes)) == count
    if printed is not None:
        assert f"{count / 1e6:.{len(printed.partition('.')[2])}f}" == printed


def test_all_the_papers_networks_are_listed() -> None:
    assert {(n.network, n.classes) for n in PAPER_NETWORKS} == set(TABLES)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("wrn-10-1", 432 + 4_672 + 14_432 + 57_536 + 128 + 650),  # stem, blocks, BatchNorm, head
        ("mobilenet", 3_217_226),
        ("mobilenet-0.5", 823_722),
        ("resnet-20", 269_722),
        ("resnet-56", 853_018),
        ("resnet-110", 1_727_962),
        ("resnet-18", 11_173_962),
        ("mobilenetv2", 3_504_872 - 990 * 1_281),  # torchvision's, with 10 classes instead of 1000
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


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("name", sorted({name for name, _ in TABLES}))
def test_papers_networks_accept_images_of_any_size(name: str, side: int) -> None:
    with torch.device("meta"):
        network = build(name, 3, 200, image_size=side)
        check_output(network, name, (3, side, side), 200)


@pytest.mark.parametrize("name", ["resnet-20", "resnet-18", "mobilenetv2-0.5", "mobilenetv2"])
def test_every_parameter_learns(name: str) -> None:
    network = build(name, 1, 5, image_size=16)
    z = network(torch.rand(4, 1, 16, 16))
    nn.functional.cross_entropy(z, torch.arange(4)).backward()  # type: ignore[no-untyped-call]
    assert z.isfinite().all()
    for key, p in network.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.any(), key


def test_cifar_resnets_shortcut_drops_pixels_and_adds_zero_channels() -> None:
    block = BasicBlock(2, 5, stride=2)
    nn.init.zeros_(block.bn2.weight)  # the residual branch is 0
    x = torch.randn(3, 2, 6, 6)
    out = block(x)
    assert out.shape == (3, 5, 3, 3)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2].relu())
    assert not out[:, 2:].any()


def test_cifar_resnet_checks_its_depth() -> None:
    assert len(CifarResNet(14).blocks) == 6
    for depth in (2, 19):
        with pytest.raises(ValueError, match=f"depth must be 8, 14, 20, ..., got {depth}"):
            CifarResNet(depth)


def test_resnets_first_layers_keep_the_size_of_small_images() -> None:
    network = build("resnet-34", 1, 10)
    maps = []
    network.get_submodule("layer1").register_forward_pre_hook(lambda _, x: maps.append(x[0].shape))
    network(torch.rand(2, 1, 32, 32))
    assert maps == [(2, 64, 32, 32)]
    expected = torchvision.models.resnet34(num_classes=10).state_dict()
    differing = [k for k, v in network.state_dict().items() if v.shape != expected[k].shape]
    assert differing == ["conv1.weight"]


@pytest.mark.parametrize(("side", "last"), [(8, 1), (32, 2), (63, 4), (64, 2), (224, 7)])
def test_size_of_mobilenetv2s_last_map(side: int, last: int) -> None:
    with torch.device("meta"):
        network = build("mobilenetv2-0.5", 3, 10, image_size=side)
        features = network.get_submodule("features")(torch.zeros(2, 3, side, side))
    assert features.shape == (2, 1280, last, last)


def test_mobilenetv2_is_torchvisions_for_64_by_64_with_weights_for_all_sizes() -> None:
    x = torch.rand(2, 3, 64, 64)
    reference = torchvision.models.mobilenet_v2(width_mult=1.4, num_classes=20).eval()
    large, small = (build("mobilenetv2-1.4", 3, 20, image_size=n).eval() for n in (64, 32))
    for network in (large, small):
        network.load_state_dict(reference.state_dict())
    with torch.no_grad():
        assert torch.equal(large(x), reference(x))
        assert not torch.equal(small(x), reference(x))


def test_image_size_comes_from_the_data(own_models: str) -> None:
    model = f"networks.student.model={own_models}:sized"
    config = load("digits-1t1s", [model])
    network = make_model(config, "student", open_images(config.data, config.seed))
    assert parameter_count(network) == 8 * 8 * 10 + 10
    assert parameter_count(build(f"{own_models}:sized", 1, 3, {"image_size": 2}, 5)) == 4 * 3 + 3
    with pytest.raises(UsageError, match="missing 1 required positional argument: 'image_size'"):
        build(f"{own_models}:sized", 1, 3)


def test_initial_weights_do_not_depend_on_the_state_of_generators(own_models: str) -> None:
    config = load("digits-1t1s", [f"networks.student.model={own_models}:drawn"])
    images = open_images(config.data, config.seed)
    drawn = []
    for state in (1, 2):  # the generators of two ranks may differ
        random.seed(state)
        np.random.seed(state)
        drawn.append(make_model(config, "student", images).state_dict()["1.weight"])
        expected = random.Random(state).random(), np.random.RandomState(state).rand()
        assert (random.random(), np.random.rand()) == expected  # the generators are restored
    assert torch.equal(*drawn)
    other = load("digits-1t1s", ["seed=1", f"networks.student.model={own_models}:drawn"])
    weights = make_model(other, "student", images).state_dict()["1.weight"]
    assert not (weights[:2] == drawn[0][:2]).any()


def test_network_of_timm_by_name() -> None:
    if importlib.util.find_spec("timm") is None:
        missing = "timm is not installed (pip install timm)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    network = build("timm:resnet18", 1, 7)
    check_output(network, "timm:resnet18", (1, 32, 32), 7)
    assert parameter_count(network) == 11_180_103 - 2 * 64 * 7 * 7  # one channel, not three
    with pytest.raises(UsageError, match="has no network 'resnet19'; did you mean 'resnet1"):
        build("timm:resnet19", 3, 10)


def test_message_if_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError) as caught:
        build("timm:resnet50", 3, 10)
    assert str(caught.value) == (
        "model timm:resnet50: timm is not installed; pip install timm, or switokd with its extra "
        "'timm' (switokd[timm])"
    )


def test_missing_dependency_of_timm_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        build("timm:resnet50", 3, 10)


def test_message_for_a_name_unknown_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("timm")
    attributes = {
        "__version__": "1.2",
        "list_models": lambda: ["resnet50"],
        "is_model": lambda name: name == "resnet50",
    }
    for key, value in attributes.items():
        setattr(stand_in, key, value)
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    with pytest.raises(UsageError) as caught:
        build("timm:resnet5", 3, 10)
    assert str(caught.value).startswith(
        "model timm:resnet5: timm 1.2 has no network 'resnet5'; did you mean 'resnet50'?"
    )


def test_parameter_count_leaves_out_frozen_parameters() -> None:
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


def test_arguments_of_the_run_file_win_over_those_of_the_data() -> None:
    assert build("wrn-10-1", 3, 10, {"num_classes": 5})(torch.rand(2, 3, 8, 8)).shape == (2, 5)


def test_own_callable_may_lack_channels_and_classes(own_models: str) -> None:
    network = build("own_models:neither", 1, 10, {"features": 64})
    check_output(network, "own_models:neither", (1, 8, 8), 10)


def test_network_of_torchvision_by_name() -> None:
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
        ("mobilenetv2-0", {}, "width must be above 0, got 0.0"),
        ("mobilenetv3", {}, "no model 'mobilenetv3'; did you mean 'mobilenetv2'?"),
        ("resnet-19", {}, "depth must be one of 18, 20, 32, 34, 44, 56, 110, got 19"),
        ("resnet-", {}, "no model 'resnet-'"),
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
        (
            "own_models:moody",
            {},
            "in moody (model own_models:moody cannot be made with {}): ValueError: not today",
        ),
    ],
)
def test_message_for_an_invalid_model_is_one_line(
    own_models: str, name: str, kwargs: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build(name, 1, 10, kwargs)
    message = str(caught.value)
    assert sentence in message
    assert name in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("network", "image", "sentence"),
    [
        (nn.Flatten(), (1, 8, 8), "must turn 2 images into logits of shape (2, 10), got (2, 64)"),
        (nn.MaxPool2d(2, return_indices=True), (1, 8, 8), "of shape (2, 10), got tuple"),
        (nn.Conv2d(3, 1, 1), (1, 8, 8), "does not take images of 1 x 8 x 8 (channels, height"),
    ],
)
def test_message_for_an_invalid_output(
    network: nn.Module, image: tuple[int, int, int], sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_output(network, "mine", image, 10)
    assert str(caught.value).startswith("model mine ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("training", [True, False])
def test_check_output_does_not_change_the_network(training: bool) -> None:
    network = build("wrn-10-1", 1, 10).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert any("running_mean" in name for name in before)
    check_output(network, "wrn-10-1", (1, 8, 8), 10)
    assert network.training is training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None  # as if it were not installed
from switokd.errors import UsageError
from switokd.models.registry import build
build("wrn-10-1", 1, 10), build("resnet-20", 1, 10), build("mobilenet-0.5", 1, 10)
try:
    build("resnet18", 1, 10)
except UsageError as error:
    print(error)
"""


def test_own_networks_need_no_torchvision(tmp_path: Path) -> None:
    code, out, err = run([sys.executable, "-c", WITHOUT_TORCHVISION], tmp_path)
    assert code == 0, err
    assert out.startswith("no model 'resnet18'")
