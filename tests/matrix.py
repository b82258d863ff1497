"""Run the unit tests with each Python and with the oldest and newest dependencies: `make matrix`.

    python -m tests.matrix                                all combinations
    python -m tests.matrix --python 3.10 --dependencies oldest

The dependencies are those of pyproject.toml with the extras `export`, `huggingface` and
`timm`. `oldest` installs the lowest allowed version of each dependency that has a wheel for this
Python.

Not covered: most tests that train in several processes; other operating systems; GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import BIN, REPOSITORY

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
TESTS = (
    *("config", "coordination", "data", "distillation", "export", "models", "runs", "services"),
    "cli/test_cli.py",
    *(f"planning/test_{name}.py" for name in ("candidates", "cost_model", "pauses", "profile")),
    "runtime/test_placement.py",
    *(f"training/test_{name}.py" for name in ("meters", "optimizer", "schedules", "step_order")),
    "training/test_train.py::test_the_demo_command_writes_a_complete_run_folder",
)
# Old releases use parts of newer packages that are deprecated today.
WARNINGS = {"oldest": ("-W", "ignore::DeprecationWarning"), "newest": ()}
SHOWN = ("torch", "numpy", "grpcio", "protobuf", "pydantic")
TIMEOUT_SECONDS = 3600


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    python: str
    dependencies: str
    versions: str
    outcome: str
    passed: bool


def find_python(version: str) -> Path | None:
    """Find the interpreter of this version on the PATH or in the folder of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    candidates = [Path(on_path)] if on_path else []
    for python in [*candidates, *sorted(pyenv.glob(f"{version}.*/bin/python"))]:
        # A shim of pyenv on the PATH may exist and start no interpreter.
        if subprocess.run([python, "--version"], capture_output=True).returncode == 0:
            return python
    return None


def uv(*arguments: str | Path) -> str:
    """Run uv; return its standard output. Its errors are printed."""
    return subprocess.run(
        [BIN / "uv", *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def install(python: Path, dependencies: str, folder: Path) -> Path:
    """Make an environment with dependencies, test tools and switokd; return its bin folder."""
    uv("venv", "--quiet", "--clear", "--python", python, folder)
    programs = folder / "bin"
    command = ("pip", "install", "--quiet", "--python", programs / "python")
    extras = [part for name in ("export", "huggingface", "timm") for part in ("--extra", name)]
    project = ("-r", "pyproject.toml", *extras)
    # Wheels only: uv would compile an old release that has no wheel for this Python.
    uv(*command, *project, "--only-binary=:all:", "--resolution", RESOLUTIONS[dependencies])
    uv(*command, "--editable", ".[test]")  # keeps the versions that are installed
    return programs


def versions(programs: Path) -> str:
    """The versions of the dependencies that the table shows."""
    listing = json.loads(uv("pip", "list", "--format=json", "--python", programs / "python"))
    installed = {package["name"]: package["version"] for package in listing}
    return " ".join(f"{name} {installed[name].partition('+')[0]}" for name in SHOWN)


def run_tests(programs: Path, dependencies: str, log: Path) -> tuple[bool, str]:
    """Run the tests; return whether all passed, and the last line of pytest."""
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    paths = [f"tests/{name}" for name in TESTS]
    command: list[str | Path] = [programs / "python", "-m", "pytest"]
    command += ["-q", "-n", "2", "-p", "no:cacheprovider"]
    with log.open("w") as output:
        done = subprocess.run(
            [*command, *WARNINGS[dependencies], *paths],
            cwd=REPOSITORY,
            env={**os.environ, "PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS,
        )
    lines = log.read_text(encoding="utf-8").splitlines()
    return done.returncode == 0, lines[-1].strip("= ") if lines else "no output"


def results(pythons: list[str], dependencies: list[str], folder: Path) -> Iterator[Result]:
    """Test every combination; report and skip a missing Python."""
    for version in pythons:
        python = find_python(version)
        if python is None:
            print(f"Python {version} is not installed here: skipped", flush=True)
            continue
        for kind in dependencies:
            name = f"{version}-{kind}"
            print(f"Python {version}, {kind} dependencies ...", flush=True)
            installed, start = "", time.monotonic()
            try:
                programs = install(python, kind, folder / name)
                installed = versions(programs)
                passed, outcome = run_tests(programs, kind, folder / f"{name}.log")
            except subprocess.SubprocessError as error:
                passed, outcome = False, str(error)
            print(f"  {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
            shutil.rmtree(folder / name, ignore_errors=True)
            yield Result(version, kind, installed, outcome, passed)


def main() -> int:
    """Print the table; 1 if a combination failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=list(PYTHONS))
    parser.add_argument("--dependencies", nargs="+", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build/matrix")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = list(results(options.python, options.dependencies, options.folder))
    print()
    for row in rows:
        mark = "ok    " if row.passed else "FAILED"
        print(f"{mark}  {row.python:<4}  {row.dependencies}  {row.versions}  {row.outcome}")
    if not all(row.passed for row in rows):
        print(f"The output of each run is in {options.folder}.")
    return 0 if rows and all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
