"""Checks and makes the folder of a new run: the setting `run_dir`, or the next one under runs/.

Torch-free, so that `switokd train` can refuse a folder before it starts the ranks.

Not covered: the files in the folder (`run_folder.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from switokd.config.config import Config
from switokd.coordination.command_file import COMMANDS
from switokd.errors import UsageError

RUNS = Path("runs")
"""Where folders are made if `run_dir` is not set."""


def check_run_dir(config: Config) -> None:
    """UsageError if the run cannot have a folder of its own at `run_dir`.

    The folder may be there if it is empty, or if the run is to be continued.
    """
    if config.run_dir is None:
        if problem := _problem_above(RUNS / config.name):
            raise UsageError(f"no folder for the run can be made: {problem}; set run_dir")
        return
    path = Path(config.run_dir)
    with writing(path):  # such as a name that is too long
        if config.resume == "auto" and (path / "config.yaml").exists():
            return
        is_there, is_folder = path.exists(), path.is_dir()
        is_taken = is_folder and any(child.name != COMMANDS for child in path.iterdir())
    if os.path.islink(path) and not is_there:
        raise UsageError(
            f"run_dir: {path} is a link to {os.readlink(path)}, which does not exist; make that "
            "folder, or delete the link"
        )
    if is_there and not is_folder:
        raise UsageError(f"run_dir: {path} is a file; choose a new or an empty folder")
    if is_taken:
        raise taken(path)
    if problem := _problem_above(path / "config.yaml"):
        raise UsageError(f"run_dir: {path} cannot be created: {problem}; name another folder")


def make_run_dir(config: Config) -> Path:
    """Make the folder of a new run; UsageError as `check_run_dir`, or if it cannot be made."""
    check_run_dir(config)
    if config.run_dir is not None:
        path = Path(config.run_dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"run_dir: {path} cannot be created: {error.strerror}; name another folder"
            ) from None
        return path
    for number in count(1):
        path = RUNS / f"{config.name}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"{path} cannot be created: {error.strerror}; set run_dir") from None
        return path
    raise AssertionError("unreachable")


def taken(path: Path) -> UsageError:
    """Return the error for a folder that is not empty."""
    return UsageError(
        f"run_dir: {path} is not empty, and a run never overwrites files; choose another folder, "
        "or remove this folder first"
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"run_dir: {path} cannot be written: {error.strerror}") from error


def _problem_above(path: Path) -> str:
    """Say why nothing can be made at a path: by the nearest folder above it that is there."""
    above = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not os.path.isdir(above):
        return f"{above} is a file"
    return "" if os.access(above, os.W_OK | os.X_OK) else f"you may not write in {above}"
