"""Weights that do not fit wait; the newest ones are written, with their checksums.

Not covered: what is saved when (`tests/training/test_training.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from switokd.runs.weights_files import WeightsFiles
from switokd.runtime.durable import read_checked, read_sums
from tests.runtime.test_durable import disk_of

SMALL, LARGE, LARGER = ({"w": torch.full((n,), float(n))} for n in (1, 50_000, 60_000))


def test_the_newest_weights_are_written_once_there_is_space(tmp_path: Path) -> None:
    said: list[str] = []
    files = WeightsFiles(tmp_path, said.append)
    files.save({"student": SMALL}, "weights/best")
    with disk_of(100_000):
        for state in (LARGE, LARGER):
            files.save({"student": state}, "weights/best")
        with pytest.raises(OSError, match="File too large"):
            files.sync()
        path = tmp_path / "weights/best/student.pt"
        assert torch.load(path, weights_only=True) == SMALL  # the earlier file stays
    assert said[0] == (
        f"{tmp_path}/weights/best cannot be written: File too large; training goes on, and its "
        "weights are kept in memory"
    )
    files.sync()
    assert torch.equal(torch.load(path, weights_only=True)["w"], LARGER["w"])
    assert set(read_sums(path.parent)) == {"student.pt"}
    read_checked(path)
