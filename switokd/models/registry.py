"""Builds networks by name.

    wrn-DEPTH-WIDTH      WideResNet for small images, such as wrn-16-2
    resnet-DEPTH         ResNet for small images: resnet-18, -34; CIFAR's resnet-20, -32, ...
    mobilenet[-WIDTH]    MobileNet for small images, such as mobilenet-0.5
    mobilenetv2[-WIDTH]  MobileNetV2 with strides by image size, such as mobilenetv2-1.4
    resnet18, ...        a classification network of torchvision
    timm:NAME            a network of timm, if it is installed
    package.module:callable    the user's own; called with the run file's model_kwargs

The number of input channels, of classes and the shorter side of the images come from the data.
They are passed as `in_channels`, `num_classes` and `image_size` if the callable has arguments of
these names.

    outputs.py       the logits in what a network returns
    flops.py         number of parameters and multiply-adds
    paper.py         the networks of the paper's tables
    given_weights.py weights from a file; state_dicts.py and weights_file.py serve it
    own_state.py     what a network's state dict holds beside tensors

Not covered: downloading pretrained weights; inputs that are not images.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from switokd import plugins
from switokd.errors import UsageError, first_line, nearest, own_code_error
from switokd.models import families
from switokd.models.from_timm import timm_builder
from switokd.models.mobilenet import MobileNet
from switokd.models.mobilenet_v2 import mobilenet_v2
from switokd.models.outputs import Key, give_logits, not_logits
from switokd.models.resnet import resnet
from switokd.models.wide_resnet import WideResNet
from switokd.plugins import import_callable, is_object


def build(
    name: str,
    in_channels: int,
    num_classes: int,
    kwargs: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    output: Key | None = None,
) -> nn.Module:
    """Build the network `name` for images with `in_channels` and for `num_classes` classes.

    kwargs: arguments for the network's callable; they win over the three from the data.
    image_size: shorter side of the images in pixels; None: the network's default. output: where
    the logits are in what the network returns; None: guess it. The built network returns logits
    alone. UsageError if there is no such network, or it cannot be made with these arguments.
    """
    factory, of_name = _factory(name)
    arguments = {**of_name, **(kwargs or {})}
    try:
        accepted = set(inspect.signature(factory).parameters)
    except ValueError:  # a builtin without a signature
        accepted = set()
    of_data = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    for key, value in of_data.items():
        if key in accepted and value is not None:
            arguments.setdefault(key, value)
    try:
        # A copy: what the callable changes in it must not reach the configuration.
        network = factory(**copy.deepcopy(arguments))
    except BaseException as error:
        what = f"model {name} cannot be made with {arguments}"
        if found := own_code_error(error, what):
            raise found from error
        # switokd's own networks, and libraries, refuse arguments by one of these errors.
        if not isinstance(error, TypeError | ValueError | KeyError | RuntimeError):
            raise
        raise UsageError(f"{what}: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model {name} must return a torch.nn.Module, got {type(network).__name__}"
        )
    if not families.is_own(name):  # switokd's own return a tensor
        give_logits(network, name, num_classes, output)
    return network


def check_output(network: nn.Module, name: str, image: tuple[int, int, int], classes: int) -> None:
    """Send two blank images through a network; UsageError unless it returns logits `[2, classes]`.

    name: for errors. image: channels, height, width. The network's mode, buffers and weights stay
    unchanged.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            logits = network(torch.zeros(2, *image))
    except UsageError:  # of the hook that finds the logits
        raise
    except BaseException as error:
        what = (
            f"model {name} does not take images of {image[0]} x {image[1]} x {image[2]} "
            "(channels, height, width)"
        )
        if found := own_code_error(error, what):
            raise found from error
        if not isinstance(error, Exception):
            raise
        raise UsageError(f"{what}: {first_line(error)}") from error
    finally:
        network.train(was_training)
    if got := not_logits(logits, 2, classes):
        raise UsageError(
            f"model {name} must turn 2 images into logits of shape (2, {classes}), got {got}"
        )


def parameter_count(network: nn.Module) -> int:
    """Return the number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _factory(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the callable for a name, and the arguments that the name contains.

    UsageError for an unknown name.
    """
    if match := families.WIDE_RESNET.fullmatch(name):
        return WideResNet, {"depth": int(match[1]), "width": int(match[2])}
    if match := families.MOBILENET.fullmatch(name):
        return MobileNet, {"width": float(match[1] or 1)}
    if match := families.RESNET.fullmatch(name):
        return resnet, {"depth": int(match[1])}
    if match := families.MOBILENET_V2.fullmatch(name):
        return mobilenet_v2, {"width": float(match[1] or 1)}
    if name.startswith(plugins.TIMM):
        return timm_builder(name), {}
    if is_object(name):
        return plugins.factory(name), {}
    if ":" in name:
        return import_callable(name, "model"), {}
    if name in families.torchvision_names():
        return _torchvision(name), {}
    known = [*families.EXAMPLES, *sorted(families.torchvision_names())]
    raise UsageError(
        f"no model {name!r}{nearest(name, known)} (allowed: {', '.join(families.KINDS)}; "
        "see 'switokd networks')"
    )


def _torchvision(name: str) -> Callable[..., Any]:
    """Return a callable for torchvision's network, with `num_classes` as a named argument.

    torchvision's own builders hide it in **kwargs.
    """
    from torchvision.models import get_model_builder

    builder: Callable[..., Any] = get_model_builder(name)

    def make(num_classes: int, weights: Any = None, **more: Any) -> Any:
        return builder(num_classes=num_classes, weights=weights, **more)

    return make
