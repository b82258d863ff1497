"""Errors that switokd raises for its user, with their exit codes.

    SwitokdError
    ├── UsageError          2  the user must change the run file, arguments, data or world size
    ├── NonFiniteError      3  a network produced NaN or infinity
    ├── PeerError           4  another process of the run is gone, hangs or is out of step
    │   ├── CollectiveError     ... a collective failed and cannot tell which process is the cause
    │   └── CoordinatorError    ... the coordinator is the cause
    └── (anything else)     1  a fault of switokd or of a user's own module: traceback shown

130 and 143 follow the shell's convention for Ctrl-C and SIGTERM.

Each message is one line. It says what is wrong, where, which values are allowed, and what to do.

Not covered: gRPC status codes, which `switokd.services.coordinator` defines.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

EXIT_FAULT = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

E = TypeVar("E", bound="SwitokdError")


class SwitokdError(Exception):
    """Base class of all errors with a message for the user.

    every_rank: whether all ranks raise the same error, so that one rank prints it for all.
    None: the default of the class.
    """

    exit_code = EXIT_FAULT
    seen_by_every_rank = False

    def __init__(self, message: object = "", *, every_rank: bool | None = None) -> None:
        super().__init__(message)
        if every_rank is not None:
            self.seen_by_every_rank = every_rank

    def seen_by(self: E, *, every_rank: bool) -> E:
        """Return a copy for which `seen_by_every_rank` has the given value."""
        error = copy.copy(self)
        error.seen_by_every_rank = every_rank
        return error


class UsageError(SwitokdError):
    """The user must change a run file, an argument, the data or the world size."""

    exit_code = 2
    seen_by_every_rank = True


class NonFiniteError(SwitokdError):
    """A network's logits are NaN or infinite; the step was not applied."""

    exit_code = 3
    seen_by_every_rank = True


class PeerError(SwitokdError):
    """Another process of the run is gone, hangs, or is out of step."""

    exit_code = 4


class CollectiveError(PeerError):
    """A collective failed because of another rank; the coordinator may know which rank.

    doing: what this rank was waiting for. reason: the message of the collective.
    """

    def __init__(self, doing: str, reason: str) -> None:
        super().__init__(f"another rank is gone or hangs (noticed {doing}: {reason})")
        self.doing, self.reason = doing, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the constructor's arguments instead of the message made of them."""
        return type(self), (self.doing, self.reason), self.__dict__


class CoordinatorError(PeerError):
    """The coordinator cannot be reached, is gone, or refused this rank."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'X'?" for the allowed word most like `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
