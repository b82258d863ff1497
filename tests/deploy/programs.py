"""The folders of this machine that a pod of the tests needs to run Python.

Not covered: the folders of the system (`pod.py`).
"""

from __future__ import annotations

import os
import sys

from tests.support import REPOSITORY


def programs() -> list[str]:
    """The folders with the interpreter and its packages, outside those of the system."""
    named = {sys.prefix, sys.base_prefix, str(REPOSITORY), *sys.path}
    found = {os.path.realpath(path) for path in named if path and os.path.isdir(path)}
    found |= {os.path.abspath(path) for path in named if path and os.path.isdir(path)}
    outside = [path for path in sorted(found) if not path.startswith(("/usr/", "/lib/"))]
    return [p for p in outside if not any(p.startswith(f"{other}/") for other in outside)]


def may_be_read(folders: list[str]) -> bool:
    """Whether another user than root may read folders."""
    return all(os.stat(folder).st_mode & 0o005 == 0o005 for folder in folders)
