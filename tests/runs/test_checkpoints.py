"""The files of checkpoints: complete, checked, and only the newest are kept.

Not covered: what a checkpoint holds (`tests/training/test_resume.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from switokd.errors import UsageError
from switokd.runs.checkpoints import CheckpointWriter, stored, write
from switokd.training.checkpoint import copied
from tests.runtime.test_durable import disk_of

STATE: dict[str, Any] = {"step": 3, "weights": torch.arange(4.0), "names": ["a", "b"], "best": {}}


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path, 3, STATE, {"step": 3})
    (checkpoint,) = stored(tmp_path)
    state, run = checkpoint.read()
    assert (checkpoint.step, run) == (3, {"step": 3})
    assert torch.equal(state.pop("weights"), STATE["weights"])
    assert state == {"step": 3, "names": ["a", "b"], "best": {}}


@pytest.mark.parametrize("file", ["state.pt", "run.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_named(file: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path, 3, STATE, {"step": 3})
    (checkpoint,) = stored(tmp_path)
    path = checkpoint.path / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-5])
    with pytest.raises(UsageError, match=file):
        checkpoint.read()


def test_a_checkpoint_without_checksums_is_not_trusted(tmp_path: Path) -> None:
    write(tmp_path, 3, STATE, {"step": 3})
    (checkpoint,) = stored(tmp_path)
    (checkpoint.path / "SHA256SUMS").unlink()
    with pytest.raises(UsageError, match=r"no checksum of state\.pt"):
        checkpoint.read()


class Spy:
    """Would create a file when it is loaded by a plain pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_state_that_needs_code_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    spied = tmp_path / "spied"
    with pytest.raises(UsageError, match="holds a Spy; allowed are tensors"):
        write(tmp_path, 3, {"strategy": Spy(spied)}, {})
    assert not spied.exists()
    assert not stored(tmp_path)


class Point(NamedTuple):
    x: int


def test_a_named_tuple_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a Point; allowed are tensors"):
        write(tmp_path, 3, {"strategy": copied({"point": Point(1)})}, {})


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    recorded, errors = list[int](), list[str]()
    writer = CheckpointWriter(tmp_path, 2, recorded.append, errors.append)
    for step in (8, 9, 10, 1000):
        writer.put(step, STATE, {})
    writer.close()
    writer.close()
    assert [checkpoint.step for checkpoint in stored(tmp_path)] == [1000, 10]
    assert recorded == [8, 9, 10, 1000], "the record is put on the disk first"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert not errors


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path: Path) -> None:
    errors: list[str] = []
    writer = CheckpointWriter(tmp_path, 1, lambda step: None, errors.append)
    writer.put(5, STATE, {})
    writer.put(6, {**STATE, "large": torch.zeros(100_000)}, {})
    with disk_of(100_000):
        writer.close()
    (checkpoint,) = stored(tmp_path)
    assert checkpoint.step == 5
    checkpoint.read()
    assert errors == [
        "the checkpoint of step 6 cannot be written: File too large; the last checkpoint is of "
        "step 5"
    ]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]
