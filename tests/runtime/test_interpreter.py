"""Files of the user that are called like modules of Python or of packages do no harm.

Not covered: several versions of Python in one environment (`make matrix` runs this file's unit
tests); torchrun, which starts `python -m`.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from switokd.errors import UsageError
from switokd.plugins import add_import_folders, import_callable
from switokd.runtime.interpreter import python_command
from tests.support import BIN, run

SAYS = "raise SystemExit('the file of the user was imported: ' + __name__)\n"
RARE = ("antigravity", "this", "idlelib", "turtledemo")
"""Modules that must not be looked up, because the look-up imports them or a window system."""
NAMES = [name for name in sorted(sys.stdlib_module_names - {*RARE}) if find_spec(name)]
NETWORKS = """\
import torch
from torch import nn

class Items(torch.utils.data.Dataset):
    classes = ["0", "1", "2", "3"]

    def __init__(self, train=True):
        pass

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return torch.full((3, 8, 8), i / 32), i % 4

def mlp(num_classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
"""
RUN_FILE = """\
name: traps
data: {dataset: "own_nets:Items", batch_size: 16, workers: 1}
networks:
  t: {role: teacher, model: "own_nets:mlp", optimizer: {name: sgd, lr: 0.05}}
  s: {role: student, model: "own_nets:mlp", optimizer: {name: sgd, lr: 0.05}}
schedule: {epochs: 1, milestones: []}
"""


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    """A folder with a file for each module of the standard library, and for some packages."""
    folder = tmp_path / "traps"
    folder.mkdir()
    for name in [*NAMES, "torch", "numpy", "yaml", "typer", "grpc"]:
        (folder / f"{name}.py").write_text(SAYS)
    return folder


def test_there_are_traps() -> None:
    assert {"queue", "random", "logging", "types", "copy", "socket", "signal", "os"} <= {*NAMES}


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_a_child_starts_in_a_folder_full_of_traps(safe_path: str, traps: Path) -> None:
    command = [*python_command("switokd"), "--version"]
    code, out, err = run(command, traps, PYTHONSAFEPATH=safe_path)
    assert (code, err) == (0, "")
    assert out.startswith("switokd ")


def test_python_m_leaves_the_current_folder_once_switokd_runs(tmp_path: Path) -> None:
    for name in ("queue", "random", "logging", "socket", "typer", "inspect", "email"):
        (tmp_path / f"{name}.py").write_text(SAYS)
    code, _, err = run([sys.executable, "-m", "switokd", "recipes"], tmp_path)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("options", [["-m", "own"], ["-c", "import own"]])
def test_importing_switokd_leaves_the_import_path_alone(options: list[str], tmp_path: Path) -> None:
    program = "import os, sys, switokd\nprint(sys.path[0] in ('', os.getcwd()))\n"
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").write_text(program)
    (tmp_path / "own/__main__.py").write_text("")
    code, out, err = run([sys.executable, *options], tmp_path)
    assert (code, out, err) == (0, "True\n", "")


@pytest.mark.timeout(120)
def test_a_run_with_loader_processes_in_a_folder_full_of_traps(traps: Path) -> None:
    (traps / "own_nets.py").write_text(NETWORKS)
    (traps / "run.yaml").write_text(RUN_FILE)
    code, out, err = run([str(BIN / "switokd"), "train", "run.yaml", "run_dir=out"], traps)
    assert code == 0, f"{out}\n{err}"
    assert (traps / "out/curves.png").exists()
    assert (traps / "out/weights/s.pt").exists()


@pytest.mark.parametrize("name", ["queue", "yaml", "sys"])
def test_own_module_with_the_name_of_another_one_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / f"{name}.py").write_text("def build(): pass\n")
    add_import_folders([str(tmp_path)])
    with pytest.raises(UsageError) as caught:
        import_callable(f"{name}:build", "model")
    where = getattr(sys.modules[name], "__file__", "Python itself")
    assert str(caught.value) == (
        f"model {name}:build: 'build' is not there in module {name}; {tmp_path / name}.py is "
        f"hidden by the module {name} of {where}: rename the file"
    )


def test_own_module_that_imports_a_hidden_one_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "yaml.py").write_text("def own_helper(): pass\n")
    (tmp_path / "own_builder.py").write_text("from yaml import own_helper\n")
    add_import_folders([str(tmp_path)])
    with pytest.raises(UsageError, match=r"'own_helper' from 'yaml' .*; .*rename the file"):
        import_callable("own_builder:own_helper", "model")


def test_start_of_the_fork_server_keeps_the_current_folder(tmp_path: Path) -> None:
    program = "import os\nfrom switokd.runtime.interpreter import start_fork_server as s\ns()\n"
    code, out, err = run([sys.executable, "-c", f"{program}print(os.getcwd())"], tmp_path)
    assert (code, out, err) == (0, f"{os.path.realpath(tmp_path)}\n", "")
