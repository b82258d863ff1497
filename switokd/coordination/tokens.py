"""What a client finds in its environment: its token, and an operator's files. Needs no gRPC.

Not covered: tokens in files (`credentials.py`).
"""

from __future__ import annotations

import os

TOKEN = "SWITOKD_TOKEN"
"""Environment variable with the token, where no file names one."""
TOKEN_FILE, CA = "SWITOKD_TOKEN_FILE", "SWITOKD_TLS_CA"
CERTIFICATE, KEY = "SWITOKD_TLS_CERTIFICATE", "SWITOKD_TLS_KEY"
"""Environment variables with an operator's files."""

_hidden: list[str] = []


def hide_token() -> None:
    """Take the token out of the environment, so that this process's children do not have it."""
    if token := os.environ.pop(TOKEN, ""):
        _hidden[:] = [token]


def token_of_environment() -> str:
    """Return the token, also if it is hidden; empty if there is none."""
    return (os.environ.get(TOKEN) or "".join(_hidden)).strip()
