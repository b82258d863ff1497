"""How the process of a rank ends: signals, a lost launcher, one-line errors, exit codes.

Not covered: saving a checkpoint (`training/trainer.py`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from switokd.errors import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_TERMINATED,
    CollectiveError,
    OwnCodeError,
    PeerError,
    SwitokdError,
    UsageError,
    own_code_errors,
)
from switokd.runtime.environment import Environment
from switokd.runtime.kept_warnings import WARNINGS
from switokd.runtime.log import say

LESS_MEMORY = (
    "choose a smaller data.batch_size, compute.precision=bf16, more ranks for this network "
    "(networks.NAME.ranks), or compute.cuda_graphs=false"
)

UNWIND_SECONDS = 2.0
"""How long the main thread may take to end after a failure, before the process is ended."""

GRACE_SECONDS = 20.0
"""How long after SIGTERM a rank may take to end its step and to save a checkpoint."""

PRECEDENCE_SECONDS = 10.0
"""How long a rank waits for the machine's first rank to print an error that all ranks raise."""

END_POLL_SECONDS = 0.05
"""How often `end_group` looks."""

PARENT = "SWITOKD_PARENT"
"""Environment variable with the process without which `switokd train` must not go on."""

VERBOSE = "SWITOKD_VERBOSE"
"""Environment variable that --verbose sets, for this process and those that it starts."""

_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""Environment variable that only torchrun sets, not `switokd train`."""

WATCH_SECONDS = 0.5
"""How often a rank checks that its launcher is running."""


class Terminated(BaseException):
    """Raised on SIGTERM; a BaseException, so that `except Exception` does not catch it."""


class Preempted(Terminated):
    """SIGTERM was obeyed after a whole step, by all ranks together; the message says what to do."""

    exit_code = EXIT_TERMINATED


class Stopped(Preempted):
    """A command has ended the run after a whole step; nothing may start it again by itself."""

    exit_code = EXIT_STOPPED


def print_error(sentence: str, who: str = "") -> None:
    """Print an error to standard error; see `log.say`. who: names the rank in the line."""
    say(sentence, "error", who)


def print_warning(sentence: str, who: str = "", keep: bool = True) -> None:
    """Print to standard error what the user may have to act on, as `print_error`.

    keep: whether the run folder keeps it as well.
    """
    say(sentence, "warning", who)
    if keep:
        WARNINGS.note(sentence)


def told(error: SwitokdError) -> str:
    """Return an error's message; with --verbose, print the frames of a mistake's cause first."""
    cause, seen = error.__cause__, {id(error)}
    while isinstance(cause, SwitokdError) and id(cause) not in seen:
        seen.add(id(cause))
        cause = cause.__cause__
    if cause is not None and isinstance(error, UsageError) and os.environ.get(VERBOSE):
        sys.stderr.write("".join(traceback.format_exception(cause)))  # one write, as above
        return str(error)
    return f"{error}; --verbose shows the frames" if isinstance(error, OwnCodeError) else str(error)


@contextmanager
def one_line_errors(env: Environment, who: str = "") -> Iterator[None]:
    """End the process with a one-line error and an exit code if the body fails or is stopped.

    Handles SwitokdError, errors of the user's own code, SIGINT, SIGTERM, and a GPU that is out of
    memory. Other exceptions pass with their traceback. who: names this rank in the line.
    """
    try:
        with own_code_errors():
            yield
    except SwitokdError as error:
        if isinstance(error, CollectiveError) and env.under_torchrun:
            # The launcher owns the store in which the ranks meet. If the launcher has ended, the
            # collective may fail first; `follow_launcher` then names the cause and ends this rank.
            ignore_sigterm()
            time.sleep(2 * WATCH_SECONDS)
        if error.seen_by_every_rank and env.local_rank > 0:
            # One line is enough: local rank 0 prints the error. The launcher then sends SIGTERM.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PRECEDENCE_SECONDS)
        print_error(told(error), "" if error.seen_by_every_rank else who)
        if isinstance(error, PeerError):
            wake_stopped_siblings()
        _exit(error.exit_code)
    except KeyboardInterrupt as interrupt:
        if env.local_rank == 0:
            print_error(str(interrupt) or "interrupted")
        _exit(EXIT_INTERRUPTED)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which is not imported here
            raise
        print_error(f"{str(error).partition('. GPU')[0]}; {LESS_MEMORY}", who)
        _exit(UsageError.exit_code)
    except Preempted as stopped:
        if env.local_rank == 0:
            print_error(str(stopped))
        # torchrun starts its ranks again after every other code than 0.
        is_final = isinstance(stopped, Stopped) and _RESTARTS in os.environ
        _exit(0 if is_final else stopped.exit_code)
    except Terminated:
        if env.local_rank == 0:  # all ranks get it; of a single one, the coordinator tells
            print_error("stopped by SIGTERM")
        _exit(EXIT_TERMINATED)


def follow_launcher(env: Environment) -> None:
    """End this process soon after its launcher, torchrun or `switokd train`, has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        print_error(f"the launcher (process {parent}) is gone", f"rank {env.rank}")
        _exit(PeerError.exit_code)

    if env.under_torchrun:
        threading.Thread(target=watch, daemon=True, name="parent").start()
        _wake_with_parents_death()


def _wake_with_parents_death() -> None:
    """Let Linux continue this process when its parent ends; a stopped one could notice nothing.

    SIGCONT changes nothing for a process that runs.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGCONT), 0, 0, 0)


def end_with_parent() -> None:
    """Send SIGTERM to this process when the process that the variable `PARENT` names has ended."""
    parent = int(os.environ.get(PARENT) or 0)

    def watch() -> None:
        while _is_running(parent):
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, daemon=True, name="parent").start()


def _is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended; it need not be this one's parent."""
    try:
        if os.path.isdir("/proc/self"):
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            return stat.rpartition(") ")[2][:1] not in "ZX"  # a zombie has ended
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def end_group(group: int, seconds: float) -> None:
    """Wait until all processes of a process group have ended; SIGKILL after `seconds`.

    For processes that notice nothing, because they are stopped (SIGSTOP).
    """
    deadline = time.monotonic() + seconds
    while _has_running(group):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            return
        time.sleep(END_POLL_SECONDS)


def _has_running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS: all that is left are zombies
        return False
    if not os.path.isdir("/proc/self"):
        return True
    for path in Path("/proc").glob("[0-9]*/stat"):  # zombies that nobody reaps have ended
        with suppress(OSError):
            state, _, of_group = path.read_text(errors="replace").rpartition(") ")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                return True
    return False


def wake_stopped_siblings() -> None:
    """Continue (SIGCONT) stopped ranks of the same torchrun, so that they notice the lost run.

    A stopped rank cannot obey torchrun's SIGTERM, and torchrun waits 30 s for it. `switokd train`
    kills such a rank itself. Linux only.
    """
    if _RESTARTS not in os.environ:
        return
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = path.read_text(errors="replace").rpartition(") ")[2].split()
            if state == "T" and int(parent) == os.getppid():
                os.kill(int(path.parent.name), signal.SIGCONT)


def unwind_on_sigterm() -> None:
    """Make the first SIGTERM or SIGHUP raise Terminated in the main thread; ignore further ones."""

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        ignore_sigterm()
        raise Terminated

    _on_end(on_sigterm)


def _on_end(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle SIGTERM, and SIGHUP of a terminal that closes, unless nohup has it ignored."""
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handler)


class StopFlag:
    """Is set by the first SIGTERM or SIGHUP, so that a rank can end after a whole step.

    A second SIGTERM, or `GRACE_SECONDS` after the first one, raises Terminated in the main thread.
    """

    def __init__(self) -> None:
        self._is_set = False

    def __call__(self) -> bool:
        """Return whether SIGTERM has arrived."""
        return self._is_set

    def install(self) -> None:
        """Handle SIGTERM from now on; call this on the main thread."""
        _on_end(self._on_sigterm)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._is_set = True
        # The system and the shell both send SIGHUP when a terminal closes: the second says nothing.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        unwind_on_sigterm()
        timer = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on, because this rank ends already and knows a better reason."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def end_if_stuck(who: str) -> Callable[[SwitokdError], None]:
    """Return a callback for a failure that another thread than the main thread notices.

    The main thread may wait in a collective for a minute. If the process still runs after
    UNWIND_SECONDS, the callback prints the failure and ends the process.
    """

    def on_failure(error: SwitokdError) -> None:
        def end() -> None:
            print_error(str(error), who)
            wake_stopped_siblings()
            _exit(error.exit_code)

        timer = threading.Timer(UNWIND_SECONDS, end)
        timer.daemon = True
        timer.start()

    return on_failure


def _exit(code: int) -> None:
    """End the process without waiting for threads and collectives of the failed run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
