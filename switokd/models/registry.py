"""Networks by name.

    wrn-DEPTH-WIDTH      WideResNet for small images, such as wrn-16-2
    resnet-DEPTH         ResNet for small images: resnet-18, -34; CIFAR's resnet-20, -32, ...
    mobilenet[-WIDTH]    MobileNet for small images, such as mobilenet-0.5
    mobilenetv2[-WIDTH]  MobileNetV2 with strides by the images' size, such as mobilenetv2-1.4
    resnet18, ...        torchvision's, by its name
    timm:NAME            timm's, where it is installed
    package.module:callable    any other; called with the run file's model_kwargs

Input channels, classes and the shorter side of the images come from the data: they are passed as
`in_channels`, `num_classes` and `image_size` to every callable that takes arguments of these names.

    flops.py    parameters and multiply-adds
    paper.py         which network is in which table of the paper

Not covered: downloading pretrained weights, inputs that are not images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from switokd import plugins
from switokd.errors import UsageError, first_line, nearest
from switokd.models import families
from switokd.models.from_timm import PREFIX, timm_builder
from switokd.models.mobilenet import MobileNet
from switokd.models.mobilenet_v2 import mobilenet_v2
from switokd.models.resnet import resnet
from switokd.models.wide_resnet import WideResNet
from switokd.plugins import import_callable, is_object

FAMILIES = (
    "wrn-DEPTH-WIDTH",
    "resnet-DEPTH",
    "mobilenet-WIDTH",
    "mobilenetv2-WIDTH",
    "a classification model of torchvision",
    "timm:NAME",
    "package.module:callable",
)
"""Names that `build` takes, in words."""


def build(
    name: str,
    in_channels: int,
    num_classes: int,
    kwargs: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """Make the network `name` for images of `in_channels` and `num_classes` classes.

    image_size: shorter side of the images in pixels; None leaves it to the network's own default.
    UsageError if there is none of that name or it cannot be made with these arguments.
    """
    factory, own = _factory(name)
    arguments = {**own, **(kwargs or {})}
    try:
        accepted = set(inspect.signature(factory).parameters)
    except ValueError:  # builtins without a signature
        accepted = set()
    of_data = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    for key, value in of_data.items():
        if key in accepted and value is not None:
            arguments.setdefault(key, value)
    try:
        network = factory(**arguments)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"model {name} cannot be made with {arguments}: {first_line(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model {name} must return a torch.nn.Module, got {type(network).__name__}"
        )
    return network


def check_output(network: nn.Module, name: str, image: tuple[int, int, int], classes: int) -> None:
    """Send two blank images through; UsageError unless logits `[2, classes]` come out.

    image: channels, height, width.
    Leaves the network's mode, buffers and weights as they were.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            found = network(torch.zeros(2, *image))
    except Exception as error:
        raise UsageError(
            f"model {name} does not take images of {image[0]} x {image[1]} x {image[2]} "
            f"(channels, height, width): {first_line(error)}"
        ) from error
    finally:
        network.train(was_training)
    shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    if shape != (2, classes):
        raise UsageError(
            f"model {name} must turn 2 images into logits of shape (2, {classes}), got {shape}"
        )


def load_weights(network: nn.Module, path: Path, what: str) -> None:
    """Load a state dict into a network; UsageError if the file is none, or of another network.

    what: names the setting in the error.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        reason = getattr(error, "strerror", None) or "it is no state dict saved by torch.save"
        raise UsageError(f"{what}: {path} cannot be read: {reason}") from None
    own = network.state_dict()
    if not isinstance(state, dict):
        raise UsageError(f"{what}: {path} holds no state dict, but a {type(state).__name__}")
    odd = [key for key in [*own, *state] if (key in own) != (key in state)]
    odd += [key for key in own if key in state and _form(own[key]) != _form(state[key])]
    if odd:
        key = odd[0]
        there, here = (_form(side[key]) if key in side else "not there" for side in (state, own))
        raise UsageError(
            f"{what}: {path} is of another network: {key} is {there} in the file and {here} in the "
            f"network ({len(odd)} of {len(own)} entries differ)"
        )
    network.load_state_dict(state)


def _form(value: Any) -> tuple[int, ...] | str:
    """A tensor's shape; of anything else, what it is."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return f"a {type(value).__name__}"


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _factory(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    if match := families.WIDE_RESNET.fullmatch(name):
        return WideResNet, {"depth": int(match[1]), "width": int(match[2])}
    if match := families.MOBILENET.fullmatch(name):
        return MobileNet, {"width": float(match[1] or 1)}
    if match := families.RESNET.fullmatch(name):
        return resnet, {"depth": int(match[1])}
    if match := families.MOBILENET_V2.fullmatch(name):
        return mobilenet_v2, {"width": float(match[1] or 1)}
    if name.startswith(PREFIX):
        return timm_builder(name), {}
    if is_object(name):
        return plugins.factory(name), {}
    if ":" in name:
        return import_callable(name, "model"), {}
    if name in _torchvision_names():
        return _torchvision(name), {}
    known = ["wrn-16-2", "resnet-20", "mobilenet", "mobilenetv2", *_torchvision_names()]
    raise UsageError(
        f"no model {name!r}{nearest(name, known)} (allowed: {', '.join(FAMILIES)}; "
        "see 'switokd networks')"
    )


def _torchvision(name: str) -> Callable[..., Any]:
    """A network of torchvision's, which has its arguments in **kwargs, with what data decide."""
    from torchvision.models import get_model_builder

    builder: Callable[..., Any] = get_model_builder(name)

    def make(num_classes: int, weights: Any = None, **more: Any) -> Any:
        return builder(num_classes=num_classes, weights=weights, **more)

    return make


def _torchvision_names() -> list[str]:
    try:
        import torchvision.models
    except ModuleNotFoundError:  # where a new PyTorch has none yet; our own networks need none
        return []

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names
