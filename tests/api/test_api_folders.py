"""Modules of the user's own by Python: found by import_from, and again from another folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import switokd
from switokd.config.run_file import load, load_importable
from switokd.errors import UsageError
from switokd.export.exporter import export
from switokd.export.manifest import Manifest

NETS = """
from torch import nn


def flat(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
FROZEN = """
from switokd.distillation.strategies.base import Strategy


class Frozen(Strategy):
    frozen_teachers = True


class Free(Strategy):
    pass
"""
FEW = {"schedule.max_steps": 2, "networks.student.model": "aside_nets:flat"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with modules in lib/, not the current one; modules are forgotten afterwards."""
    made, cwd = tmp_path / "project", tmp_path / "cwd"
    (made / "lib").mkdir(parents=True)
    cwd.mkdir()
    (made / "lib" / "aside_nets.py").write_text(NETS)
    (made / "lib" / "aside_strategies.py").write_text(FROZEN)
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield made
    forget()


def forget() -> None:
    """Have the modules imported anew."""
    for name in ("aside_nets", "aside_strategies"):
        sys.modules.pop(name, None)


def content() -> dict[str, Any]:
    """A run file's content."""
    raw: dict[str, Any] = yaml.safe_load(load("digits-1t1s").dump())
    return raw


def is_found_from(elsewhere: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's network, by Python and by export, from a folder that knows nothing of it."""
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = list(sys.path)
    forget()
    made = switokd.load_run(run).network("student")
    assert made(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sys.path == before
    forget()
    folder = export(run, wanted=["state-dict"], out=elsewhere / "exported")
    assert Manifest.load(folder).model == "aside_nets:flat"


def test_import_from_counts_from_the_run_files_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project / "mine.yaml"
    file.write_text(yaml.safe_dump({**content(), "import_from": ["lib"]}))
    before = list(sys.path)
    made = switokd.train(file, {**FEW, "run_dir": str(tmp_path / "out")})
    assert sys.path == before
    kept = [str(project / "lib"), str(project), str(tmp_path / "cwd")]
    assert list(made.config.import_from) == kept
    is_found_from(tmp_path / "elsewhere", made.path, monkeypatch)


def test_a_dicts_import_from_counts_from_the_current_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {**content(), "import_from": ["../project/lib"]}
    here = switokd.train(raw, {**FEW, "run_dir": str(tmp_path / "here")})
    alone = {"placement": "replicated", "coordinator": "off"}
    there = switokd.train(raw, {**FEW, **alone, "run_dir": str(tmp_path / "there")}, processes=1)
    for run in (here, there):
        assert (Path(run.config.import_from[0]) / "aside_nets.py").is_file()
        assert run.network("student")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    is_found_from(tmp_path / "elsewhere", there.path, monkeypatch)


def test_a_run_of_the_command_lines_is_found_from_elsewhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.yaml as `switokd train` writes it."""
    file = project / "mine.yaml"
    file.write_text(yaml.safe_dump({**content(), "import_from": ["lib"]}))
    settings = ["networks.student.model=aside_nets:flat", "schedule.max_steps=2"]
    config = load_importable(str(file), settings)
    made = switokd.train(config, {"run_dir": str(tmp_path / "out")})
    is_found_from(tmp_path / "elsewhere", made.path, monkeypatch)


def test_own_strategies_with_frozen_teachers_need_trained_ones(project: Path) -> None:
    file = project / "mine.yaml"
    file.write_text(yaml.safe_dump({**content(), "import_from": ["lib"]}))
    own = "distillation.strategy=aside_strategies:"
    words = r"networks\.teacher\.weights: strategy aside_strategies:Frozen does not train"
    with pytest.raises(UsageError, match=words) as found:
        load_importable(str(file), [f"{own}Frozen"])
    assert "\n" not in str(found.value)
    with pytest.raises(UsageError, match=words):
        switokd.train(file, {"distillation.strategy": "aside_strategies:Frozen"})
    load_importable(str(file), [f"{own}Frozen", "networks.teacher.weights=there.pt"])
    load_importable(str(file), [f"{own}Free"])
