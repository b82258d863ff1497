"""Every error that switokd raises for a reader, and the exit code it ends with.

    SwitokdError
    ├── UsageError          2  the user's to mend: run file, arguments, data, world size
    ├── NonFiniteError      3  a network produced NaN or infinity
    ├── PeerError           4  another process of the run is gone, hangs or is out of step
    │   ├── CollectiveError     ... noticed by a collective, which cannot tell which process it is
    │   └── CoordinatorError    ... and that process is the coordinator
    └── (anything else)     1  a fault of switokd or of a user's own module: traceback shown

130 and 143 follow the shell's convention for Ctrl-C and SIGTERM.

Each message is one line: what was found, where, what is allowed, what to do.
Not covered: gRPC status codes, which `switokd.services.coordinator` has of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAULT = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class SwitokdError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = EXIT_FAULT
    seen_by_every_rank = False
    """Whether all ranks find the same error by themselves, so that one needs to print it."""


class UsageError(SwitokdError):
    """The user's to mend: a run file, an argument, missing data, a wrong world size."""

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
    """A collective failed: some peer is the cause, and the coordinator may know which.

    `doing` says what the rank was waiting for.
    """

    def __init__(self, doing: str, reason: str) -> None:
        super().__init__(f"another rank is gone or hangs (noticed {doing}: {reason})")
        self.doing = doing


class CoordinatorError(PeerError):
    """The coordinator cannot be reached, is gone, or refused this rank."""


def first_line(error: BaseException) -> str:
    """What an error says first; its kind, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(found: str, allowed: Iterable[str]) -> str:
    """Return ", did you mean X?" for the closest allowed word, or nothing."""
    close = difflib.get_close_matches(found, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
