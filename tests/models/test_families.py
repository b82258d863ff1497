"""Names that a run file may give a network: what is refused is what cannot be built."""

from __future__ import annotations

import pytest
import torchvision.models
from torchvision.models import list_models

from switokd.errors import UsageError
from switokd.models.families import RESNET_DEPTHS, allowed_instead, torchvision_names
from switokd.models.registry import build

WRONG = ["wrn-9-1", "wrn-4-1", "wrn-16-0", "resnet-19", "resnet-10", "mobilenet-0", "mobilenetv2-0"]
UNKNOWN = ["wrn-1", "wrn-16-2-3", "resnet-", "res net", "mobilenet-x", "a/b", "timm/resnet18"]
GOOD = ["wrn-10-1", "wrn-16-2", "mobilenet-0.25", "mobilenet", "mobilenetv2-0.5"]


@pytest.mark.parametrize("name", [*WRONG, *UNKNOWN])
def test_a_name_that_is_refused_cannot_be_built(name: str) -> None:
    assert allowed_instead(name)
    with pytest.raises(UsageError):
        build(name, 1, 10)


@pytest.mark.parametrize("name", [*GOOD, *(f"resnet-{depth}" for depth in RESNET_DEPTHS)])
def test_a_name_that_is_not_refused_can_be_built(name: str) -> None:
    assert allowed_instead(name) == ""
    build(name, 1, 10)


def test_torchvisions_names_are_those_that_it_has_itself() -> None:
    assert torchvision_names() == set(list_models(module=torchvision.models))
    assert allowed_instead("resnet19").endswith("did you mean 'resnet18'?")


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "timm:resnet18", "mine:net"])
def test_names_that_only_their_library_knows_are_not_refused(name: str) -> None:
    assert allowed_instead(name) == ""


def test_what_is_allowed_is_said() -> None:
    assert allowed_instead("wrn-9-1") == "a depth of 10, 16, 22, 28, ... and a width of 1 or more"
    assert allowed_instead("resnet-19") == "a depth of 18, 20, 32, 34, 44, 56, 110"
    assert allowed_instead("wrn-16").endswith("package.module:callable; did you mean 'wrn-16-2'?")
