"""Whether a path is a run folder, for all commands and functions that read one.

Imports nothing of the configuration, so that a wrong path is told at once.

Not covered: what a run folder holds (`runs/run_folder.py`); reading its config.yaml
(`run_file.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

from switokd.errors import UsageError, nearest

CONFIG = "config.yaml"
"""The file that every run folder has."""
NEWEST = 3
"""Runs inside a folder that an error names, at most."""


def config_file(folder: Path) -> Path:
    """Return a run folder's config.yaml; UsageError if the path is no run folder."""
    try:
        if os.path.isfile(folder / CONFIG):
            return folder / CONFIG
        raise UsageError(_problem(folder))
    except OSError as error:  # a folder that may not be listed
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from None


def _problem(path: Path) -> str:
    if not os.path.exists(path):
        beside = [p.name for p in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        return f"{path}: there is no such folder{nearest(path.name, beside)}"
    if not os.path.isdir(path):
        hint = f", such as {path.parent}" if os.path.isfile(path.parent / CONFIG) else ""
        return f"{path} is a file; name a run folder{hint}"
    inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
    hint = f"; it holds the runs {', '.join(inside[-NEWEST:])}" if inside else ""
    return f"{path} is no run folder: there is no {CONFIG} in it{hint}"
