"""Loading networks from a run folder, and the signature that the run saved.

Not covered: exporting (`test_exporter.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from switokd.config.data_section import Data
from switokd.config.run_file import load
from switokd.data.images import open_images
from switokd.data.signature import InputSignature
from switokd.errors import UsageError
from switokd.export.trained import build, load_trained
from switokd.models import registry
from switokd.runs.run_folder import RunFolder


def signature(**other: Any) -> InputSignature:
    defaults = {
        "channels": 3,
        "height": 64,
        "width": 80,
        "values": "floats",
        "resize": (64, 80),
        "labels": ("cat", "dog"),
    }
    return InputSignature.model_validate({**defaults, **other})


def strides(network: nn.Module) -> list[tuple[int, ...]]:
    return [m.stride for m in network.modules() if isinstance(m, nn.Conv2d)]


def test_network_is_built_for_the_runs_image_size() -> None:
    found = strides(build("mobilenetv2-0.5", {}, signature()))
    assert found == strides(registry.build("mobilenetv2-0.5", 3, 2, image_size=64))
    assert found != strides(registry.build("mobilenetv2-0.5", 3, 2, image_size=32))


def test_building_leaves_the_random_number_generator_unchanged() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    build("wrn-10-1", {}, signature())
    assert torch.rand(1) == expected


def test_weights_of_a_run_that_ended(tmp_path: Path) -> None:
    folder = RunFolder(load("digits-1t1s", [f"run_dir={tmp_path / 'out'}"]))
    images = open_images(Data(), seed=0)
    folder.save_signature(InputSignature.of(images))
    with pytest.raises(UsageError, match=r"has no weights/student\.pt: the run has not ended"):
        load_trained(folder.path)
    states = {
        kind: registry.build("wrn-10-1", in_channels=1, num_classes=10).state_dict()
        for kind in ("last", "best", "ema")
    }
    folder.weights.save({"student": states["last"], "student.ema": states["ema"]}, "weights")
    folder.weights.save({"student": states["best"]}, "weights/best")
    top1 = {"top1_last": 1.0, "top1_best": 2.0, "top1_ema_last": 3.0}
    folder.finish({"networks": {"student": top1}})
    for weights, expected in (("last", 1.0), ("best", 2.0), ("ema", 3.0)):
        trained = load_trained(folder.path, weights=weights)  # type: ignore[arg-type]
        assert (trained.name, trained.weights, trained.top1) == ("student", weights, expected)
        assert not trained.network.training
        assert torch.equal(
            trained.network.state_dict()["head.weight"], states[weights]["head.weight"]
        )


def test_signature_of_a_data_set_survives_its_file(tmp_path: Path) -> None:
    found = InputSignature.of(open_images(Data(), seed=0))
    assert (found.shape, found.resize, found.classes) == ((1, 8, 8), (8, 8), 10)
    assert (found.mean, found.std, found.values) == ((0.306,), (0.377,), "bytes")
    found.save(tmp_path / "signature.json")
    assert InputSignature.load(tmp_path / "signature.json") == found


def test_scaling_is_one_number_or_one_per_channel() -> None:
    found = signature().with_scaling((0.5,), (0.1, 0.2, 0.3))
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert "RGB, values 0 to 1" in found.takes
    for mean, std, words in (
        ((0.5, 0.5), (1.0,), "mean and std need 3 numbers each, or none"),
        ((0.5,), (0.0,), "std needs numbers above 0"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            signature().with_scaling(mean, std)
        assert "\n" not in str(caught.value)
