"""Output that nobody can read: it costs a command nothing but its output.

`accept_any_console` is for every command: standard streams that are closed, and encodings that lack
a character. `outlive_console` is for a run, which goes on when its reader goes away. `quiet_grpc`
keeps gRPC's own lines out of it.

Not covered: the signal SIGHUP, which a closing terminal sends as well (`lifecycle.py`).
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)
"""Errors of a stream whose reader or terminal is gone."""


class _Lasting:
    """A text stream; what cannot be written to it is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        """Send all that follows to nowhere, if the reader is gone; a full disk may get space."""
        if error.errno in GONE:
            lead_nowhere(self._stream)


def lead_nowhere(stream: TextIO) -> None:
    """Send all that a stream has not written yet, and what follows, to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def quiet_grpc() -> None:
    """Let gRPC write no lines of its own, in this process and its children.

    It would write one for each connection that fails, such as a stranger's. Must be called before
    gRPC is imported; a user who sets GRPC_VERBOSITY sees them.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def accept_any_console() -> None:
    """Open closed standard streams to nowhere; escape characters that an encoding lacks.

    The next file that is opened gets the number of a closed stream. What a library prints to
    standard error would then be written into this file. A width of no columns, which would hide all
    output, is left out of the environment.
    """
    for name in ("COLUMNS", "LINES"):
        if not os.environ.get(name, "").strip("0"):
            os.environ.pop(name, None)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", encoding="utf-8"))  # noqa: SIM115
        elif descriptor and isinstance(stream, TextIOWrapper):
            with suppress(OSError):  # the stream was of a file, and another process made it a pipe
                stream.reconfigure(errors="backslashreplace")


def outlive_console() -> None:
    """Let this process go on when the reader of its standard output or error goes away."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream))
