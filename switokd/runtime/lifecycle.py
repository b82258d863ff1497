"""How a rank's process ends: signals, a dead parent, errors in one line, exit codes.

Not covered: checkpoints on SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

UNWIND_SECONDS = 5.0
"""How long a rank that knows of a failure may take to unwind before it is ended."""

PRECEDENCE_SECONDS = 10.0
"""How long a rank leaves it to the machine's first rank to print an error that both found."""

WATCH_SECONDS = 0.5
"""How often a rank looks whether its launcher is still there."""


class Terminated(BaseException):
    """SIGTERM. Like KeyboardInterrupt no Exception, so that nothing swallows it."""


def print_error(sentence: str, who: str = "") -> None:
    """Print one line to standard error."""
    # In one piece: ranks share the terminal, and print() would write the line's end by itself.
    sys.stderr.write(f"switokd: {who + ': ' if who else ''}{sentence}\n")
    sys.stderr.flush()


@contextmanager
def one_line_errors(env: Environment, who: str = "") -> Iterator[None]:
    """End the process with a line and an exit code if the body raises a SwitokdError, finds no more
    memory on its GPU, or is stopped.

    who: names this rank in the line. Other exceptions pass, with their traceback.
    """
    try:
        yield
    except SwitokdError as error:
        if isinstance(error, CollectiveError) and env.under_torchrun:
            # Ranks meet in a store of the launcher's, whose end may show before the launcher's
            # own: then it is `follow_launcher` that says so, and ends this process.
            ignore_sigterm()
            time.sleep(2 * WATCH_SECONDS)
        if error.seen_by_every_rank and env.local_rank > 0:
            # One line is enough. torchrun ends all ranks when the first one ends, so wait for
            # the one that prints it, and for SIGTERM.
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
    except Terminated:
        print_error("stopped by SIGTERM", who)
        _exit(EXIT_TERMINATED)


def follow_launcher(env: Environment) -> None:
    """End at once when torchrun (or `switokd train`) is gone, which no signal tells."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        print_error(f"the launcher (process {parent}) is gone", f"rank {env.rank}")
        _exit(PeerError.exit_code)

    if env.under_torchrun:
        threading.Thread(target=watch, daemon=True, name="parent").start()


def unwind_on_sigterm() -> None:
    """From now on SIGTERM raises Terminated in the main thread, once."""

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        ignore_sigterm()
        raise Terminated

    signal.signal(signal.SIGTERM, on_sigterm)


def ignore_sigterm() -> None:
    """From now on SIGTERM does nothing: this rank is ending already, and knows more than that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_if_stuck(who: str) -> Callable[[SwitokdError], None]:
    """Make a callback for a failure noticed beside the main thread.

    The main thread may sit in a collective that will not return for a minute. If it has not
    ended the process itself by then, the callback does, with the failure's line.
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
    """Leave without waiting for threads and collectives of a run that has failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
