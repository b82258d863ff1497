"""The checks of the wire contract detect a breaking change and bad style."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import BIN, REPOSITORY

PROTO = REPOSITORY / "proto"


def buf(*arguments: str) -> int:
    return subprocess.run([BIN / "buf", *arguments], capture_output=True).returncode


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of proto/ that a test may change."""
    return Path(shutil.copytree(PROTO, tmp_path / "proto"))


def replace_text(folder: Path, old: str, new: str) -> None:
    path = folder / "switokd" / "v1" / "coordinator.proto"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_contract_passes_its_checks() -> None:
    assert buf("lint", str(PROTO)) == 0
    assert buf("breaking", str(PROTO), "--against", str(PROTO / "baseline.json")) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("double gap = 3;", "double gap = 13;"),
        ("int64 step = 1;", "int32 step = 1;"),
        ("MODE_EXPERT = 2;", "MODE_EXPERT = 3;"),
        ("rpc Join(", "rpc Enter("),
    ],
)
def test_a_breaking_change_is_detected(changed: Path, old: str, new: str) -> None:
    replace_text(changed, old, new)
    assert buf("breaking", str(changed), "--against", str(PROTO / "baseline.json")) == 100


def test_bad_style_is_detected(changed: Path) -> None:
    replace_text(changed, "message Leave {", "message leave_run {")
    assert buf("lint", str(changed)) == 100


def test_a_new_field_is_no_breaking_change(changed: Path) -> None:
    replace_text(changed, "message Leave {", "message Leave {\n  string note = 9;")
    assert buf("breaking", str(changed), "--against", str(PROTO / "baseline.json")) == 0
