"""How the process of a rank ends: signals, a lost launcher, one-line errors, exit codes.

Not covered: saving a checkpoint (`training/trainer.py`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from switokd.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    CollectiveError,
    PeerError,
    SwitokdError,
    UsageError,
)
from switokd.runtime.environment import Environment

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

WATCH_SECONDS = 0.5
"""How often a rank checks that its launcher is running."""


class Terminated(BaseException):
    """Raised on SIGTERM; a BaseException, so that `except Exception` does not catch it."""


class Preempted(Terminated):
    """SIGTERM was obeyed after a whole step, by all ranks together; the message says what to do."""


def print_error(sentence: str, who: str = "") -> None:
    """Print one line to standard error. who: names the rank in the line."""
    # Ranks share the terminal. One write keeps the line whole; print() writes its end separately.
    sys.stderr.write(f"switokd: {who + ': ' if who else ''}{sentence}\n")
    sys.stderr.flush()


@contextmanager
def one_line_errors(env: Environment, who: str = "") -> Iterator[None]:
    """End the process with a one-line error and an exit code if the body fails or is stopped.

    Handles SwitokdError, SIGINT, SIGTERM, and a GPU that is out of memory. Other exceptions pass
    with their traceback. who: names this rank in the line.
    """
    try:
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
        print_error(str(error), "" if error.seen_by_every_rank else who)
        _exit(error.exit_code)
    except KeyboardInterrupt:
        if env.local_rank == 0:
            print_error("interrupted")
        _exit(EXIT_INTERRUPTED)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which is not imported here
            raise
        print_error(f"{str(error).partition('. GPU')[0]}; {LESS_MEMORY}", who)
        _exit(UsageError.exit_code)
    except Preempted as stopped:
        if env.local_rank == 0:
            print_error(str(stopped))
        _exit(EXIT_TERMINATED)
    except Terminated:
        print_error("stopped by SIGTERM", who)
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


def unwind_on_sigterm() -> None:
    """Make the first SIGTERM raise Terminated in the main thread; ignore further ones."""

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        ignore_sigterm()
        raise Terminated

    signal.signal(signal.SIGTERM, on_sigterm)


class StopFlag:
    """Is set by the first SIGTERM, so that a rank can end after a whole step.

    A second SIGTERM, or `GRACE_SECONDS` after the first one, raises Terminated in the main thread.
    """

    def __init__(self) -> None:
        self._is_set = False

    def __call__(self) -> bool:
        """Return whether SIGTERM has arrived."""
        return self._is_set

    def install(self) -> None:
        """Handle SIGTERM from now on; call this on the main thread."""
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._is_set = True
        unwind_on_sigterm()
        timer = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on, because this rank ends already and knows a better reason."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_if_stuck(who: str) -> Callable[[SwitokdError], None]:
    """Return a callback for a failure that another thread than the main thread notices.

    The main thread may wait in a collective for a minute. If the process still runs after
    UNWIND_SECONDS, the callback prints the failure and ends the process.
    """

    def on_failure(error: SwitokdError) -> None:
        def end() -> None:
            print_error(str(error), who)
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
