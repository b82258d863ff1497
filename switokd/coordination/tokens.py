"""The token that a rank finds in its environment. Imported without gRPC, by the launcher as well.

Not covered: tokens in files (`credentials.py`).
"""

from __future__ import annotations

import os

TOKEN = "SWITOKD_TOKEN"
"""Environment variable with the token, where no file names one."""

_hidden: list[str] = []


def hide_token() -> None:
    """Take the token out of the environment, so that this process's children do not have it."""
    if token := os.environ.pop(TOKEN, ""):
        _hidden[:] = [token]


def token_of_environment() -> str:
    """Return the token, also if it is hidden; empty if there is none."""
    return (os.environ.get(TOKEN) or "".join(_hidden)).strip()
