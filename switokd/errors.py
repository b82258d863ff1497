"""Errors that switokd raises for its user, with their exit codes.

    SwitokdError
    ├── UsageError          2  the user must change the run file, arguments, data or world size
    │   └── OwnCodeError        ... a module of the user's own raised an error
    ├── NonFiniteError      3  a network produced NaN or infinity
    ├── PeerError           4  another process of the run is gone, hangs or is out of step
    │   ├── CollectiveError     ... a collective failed and cannot tell which process is the cause
    │   └── CoordinatorError    ... the coordinator is the cause
    ├── RunFailedError      5  the run that a command has watched has failed
    └── (anything else)     1  a fault of switokd: traceback shown

6 means that a command of an operator has ended the run, or that `switokd watch` has seen a run that
was stopped. 7 means that `switokd replay` has found a record that does not follow from its
distances. 130 and 143 follow the shell's convention for Ctrl-C and SIGTERM.

Each message is one line. It says what is wrong, where, which values are allowed, and what to do. A
run file or command line with several mistakes gives a line for each.

An error belongs to the user's own module if the innermost frame outside libraries is in there.

Not covered: gRPC status codes, which `switokd.services.coordinator` defines; code of the user that
ends the process at once (`os._exit`, a crash), or runs in another process.
"""

from __future__ import annotations

import copy
import difflib
import linecache
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

EXIT_FAULT = 1
EXIT_STOPPED = 6
EXIT_DIFFERS = 7
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

OPEN_FILE = re.compile(r"<_io\.\w+ (?:name=(?P<name>'[^']*'|\S+?)(?: [^>]*)?|object at \w+)>")
"""How Python writes a file object, as in Pillow's messages."""

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
        error = self._copy()
        error.seen_by_every_rank = every_rank
        return error

    def under(self: E, key: str) -> E:
        """Return a copy whose message begins with a key of the run file, if it does not yet."""
        error = self._copy()
        if not re.match(rf"{re.escape(key)}\b(?!-)", str(self)):
            error.args = (f"{key}: {self}",)
        return error

    def _copy(self: E) -> E:
        error = copy.copy(self)
        error.__cause__ = self.__cause__  # `copy` leaves it out
        return error


class UsageError(SwitokdError):
    """The user must change a run file, an argument, the data or the world size."""

    exit_code = 2
    seen_by_every_rank = True


class OwnCodeError(UsageError):
    """A module of the user's own raised an error, which is the `__cause__`."""

    seen_by_every_rank = False


class Mistakes:
    """Collects UsageErrors of several bodies, so that all of them are told."""

    def __init__(self) -> None:
        self._found: list[UsageError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keep the UsageError of the body, which ends there."""
        try:
            yield
        except UsageError as error:
            self._found.append(error)

    def tell(self) -> None:
        """Raise what was kept: the error itself if there is one, else one with a line for each."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise UsageError("\n".join(str(error) for error in self._found))


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


class RunFailedError(SwitokdError):
    """The run that `switokd watch` has shown has failed, or was interrupted."""

    exit_code = 5


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if there is no message.

    A file object in the message becomes the name of its file.
    """
    return _with_names_of_files((str(error).strip().splitlines() or [type(error).__name__])[0])


def _with_names_of_files(line: str) -> str:
    return OPEN_FILE.sub(lambda file: file["name"] or "a file in memory", line)


MAX_LENGTH = 300
"""Characters of a foreign error's message that are shown, at most."""

MOST_TEXT = 80
"""Characters of a line of the user's code that are shown, at most."""

own_packages: set[str] = set()
"""Packages and modules that the user has named in an import string, wherever they are installed."""


def summary(error: BaseException) -> str:
    """Describe a foreign error in one line: its type and the first line of its message.

    A first line that ends with a colon is shown with the next line. A file object in the message
    becomes the name of its file.
    """
    kind = type(error).__name__
    try:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    except Exception:  # the user's own __str__
        lines = []
    if isinstance(error, SyntaxError) and error.msg:
        lines = [error.msg]
    if isinstance(error, SystemExit):
        lines = [f"it ends the process, with {error.code!r}"]
    if not lines:
        return kind
    said = _with_names_of_files(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])
    return f"{kind}: {said if len(said) <= MAX_LENGTH else said[:MAX_LENGTH] + '...'}"


def own_code_error(
    error: BaseException, what: str = "", door: str = "", every_rank: bool | None = None
) -> OwnCodeError | None:
    """Return the one-line error for an error of the user's code; None if it is no such error.

    what: names the part of the run that raised it, such as "network s". door: file of the module
    of switokd that called the user's code. An error that reached it through libraries alone belongs
    to the user's code as well; "": it does not. every_rank: as in SwitokdError.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, SwitokdError | KeyboardInterrupt | GeneratorExit):
        return None
    if kinds & {"OutOfMemoryError", "DistError"}:  # PyTorch's, which is not imported here
        return None
    where = _own_place(error)
    if where is None and not (door and _reached(error) == door):
        return None
    if where is None:
        said = f"{what}: {summary(error)}" if what else summary(error)
    else:
        place, text = where
        said = f"{place} ({what}): {summary(error)}" if what else f"{place}: {summary(error)}"
        said += f" ({text})" if text else ""
    return OwnCodeError(said, every_rank=every_rank)


@contextmanager
def own_code_errors(
    what: str = "", door: str = "", every_rank: bool | None = None
) -> Iterator[None]:
    """Raise OwnCodeError for an error of the user's code in the block; see `own_code_error`."""
    try:
        yield
    except BaseException as error:
        found = own_code_error(error, what, door, every_rank)
        if found is None:
            raise
        raise found from error


def _own_place(error: BaseException) -> tuple[str, str] | None:
    """Return where the user's code raised an error, and the text of the line; None if it is not
    the user's code. The place is file, line and function."""
    if isinstance(error, SyntaxError) and error.filename and os.path.isfile(error.filename):
        if not _is_switokds(error.filename, ""):
            text = _text_of(error.filename, error.lineno or 0)
            return f"{_shown(error.filename)}:{error.lineno}", text
        return None
    frame = _innermost(error)
    if frame is None or _is_switokds(*_file_and_module(frame)):
        return None
    code = frame.tb_frame.f_code
    function = "" if code.co_name == "<module>" else f" in {code.co_name}"
    text = _text_of(code.co_filename, frame.tb_lineno)
    return f"{_shown(code.co_filename)}:{frame.tb_lineno}{function}", text


def _text_of(file: str, line: int) -> str:
    """Return a line of a file in quotes, without its indentation; empty if it cannot be read."""
    text = " ".join(linecache.getline(file, line).split())
    text = text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."
    return f"`{text}`" if text else ""


def _reached(error: BaseException) -> str:
    """Return the file of the innermost frame outside libraries."""
    frame = _innermost(error)
    return "" if frame is None else frame.tb_frame.f_code.co_filename


def _innermost(error: BaseException) -> TracebackType | None:
    """Return the innermost frame of an error outside libraries; None if all are in libraries."""
    found, frame = None, error.__traceback__
    while frame is not None:
        if not _is_librarys(*_file_and_module(frame)):
            found = frame
        frame = frame.tb_next
    return found


def _file_and_module(frame: TracebackType) -> tuple[str, str]:
    code, names = frame.tb_frame.f_code, frame.tb_frame.f_globals
    return code.co_filename, str(names.get("__name__", ""))


def _is_switokds(file: str, module: str) -> bool:
    folder = os.path.dirname(os.path.abspath(__file__))
    return module.partition(".")[0] == "switokd" or file.startswith(folder + os.sep)


def _is_librarys(file: str, module: str) -> bool:
    """Return whether code is of Python, or of an installed package that the user has not named."""
    if _is_switokds(file, module):
        return False
    if file.startswith("<") and not file.startswith(("<stdin>", "<ipython")):
        return True  # of the import system, or generated
    if module.partition(".")[0] in own_packages:
        return False
    installed = {"site-packages", "dist-packages"} & set(file.split(os.sep))
    return bool(installed) or file.startswith(os.path.dirname(os.__file__) + os.sep)


def _shown(file: str) -> str:
    """Return a file's path as a user writes it: relative if it is in the current folder."""
    try:
        path = os.path.relpath(file)
    except (OSError, ValueError):  # no current folder; another drive
        return file
    return file if path.startswith(os.pardir) else path


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'X'?" for the allowed word most like `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
