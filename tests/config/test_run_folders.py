"""Which paths are run folders, and what is said of the others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from switokd.config.run_folders import config_file
from switokd.errors import UsageError


def test_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert config_file(tmp_path) == tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("runs/firts", "runs/firts: there is no such folder; did you mean 'first'?"),
        ("nowhere/first", "nowhere/first: there is no such folder"),
        ("notes", "notes is a file; name a run folder"),
        ("notes/first", "notes/first: there is no such folder"),
        ("runs/first/config.yaml", "config.yaml is a file; name a run folder, such as runs/first"),
        ("runs", "runs is no run folder: there is no config.yaml in it; it holds the runs first"),
        ("empty", "empty is no run folder: there is no config.yaml in it"),
        ("a" * 300, "there is no such folder"),
    ],
)
def test_a_path_that_is_none(
    name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/first", "empty"):
        Path(folder).mkdir(parents=True)
    for file in ("runs/first/config.yaml", "notes"):
        Path(file).touch()
    with pytest.raises(UsageError, match=f"{re.escape(problem)}$"):
        config_file(Path(name))
