"""Objects of the program as frozen teachers, and as networks to be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import switokd
from switokd.errors import UsageError
from switokd.results import Run

IMAGES = torch.rand(48, 3, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(48) % 3)


def flat(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, num_classes))


def distil(folder: Path, teacher: Any, **settings: Any) -> Run:
    few = {"data.batch_size": 12, "run_dir": str(folder), **settings}
    return switokd.distil(
        teachers={"large": teacher},
        students={"small": flat},
        train=DATA,
        test=DATA,
        epochs=1,
        settings=few,
    )


def test_a_module_given_is_a_trained_teacher(tmp_path: Path) -> None:
    module = flat(3)
    made = distil(tmp_path / "out", module, **{"distillation.strategy": "kd"})
    kept = made.network("large").state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in module.state_dict().items())
    assert made.config.import_from == ()  # objects are not imported
    assert switokd.load_run(made.path).summary["strategy"] == "kd"


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (flat, "leaves its teachers as they come, and 'large' is a callable; give a torch"),
        ("wrn-10-1", r"networks\.large\.weights: strategy kd leaves its teachers as they come"),
    ],
)
def test_a_teacher_that_nobody_trained_is_refused(teacher: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as found:
        distil(tmp_path / "out", teacher, **{"distillation.strategy": "kd"})
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()
