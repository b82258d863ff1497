"""Tells at once that nothing answers at the coordinator's address, while PyTorch is imported.

A rank joins its run some seconds after the command has started. Without the probe, a mistake in
`coordinator.address` would show only then.

Not covered: whether what answers is a coordinator (`connection.py`).
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from switokd.config.sections import Coordinator
from switokd.runtime.lifecycle import print_warning

TELL_SECONDS = 0.7
"""How long the coordinator may be silent until the user is told."""

PAUSE_SECONDS = 0.1
"""Pause between two attempts to connect."""

HINT = "is coordinator.address right (its gRPC port), and 'switokd coordinator' running there?"
"""What the user can check."""


@contextmanager
def probing(settings: Coordinator, say: Callable[[str], None] = print_warning) -> Iterator[None]:
    """Say once, during the body, that the ranks will wait for a coordinator that is not there.

    say: prints the sentence. Does nothing where the run starts its coordinator itself, or where
    there are several.
    """
    if settings.address in ("auto", "off") or "," in settings.address:  # the run's id chooses
        yield
        return
    is_over = threading.Event()

    def look() -> None:
        deadline = time.monotonic() + TELL_SECONDS
        while not _answers(settings.address, deadline):
            if is_over.wait(PAUSE_SECONDS):
                return
            if time.monotonic() >= deadline:
                say(
                    f"waiting for the coordinator at {settings.address}, for up to "
                    f"{settings.timeout:g} s (coordinator.timeout); {HINT}"
                )
                return

    thread = threading.Thread(target=look, daemon=True, name="probe")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(TELL_SECONDS)  # a name may take longer to be looked up: the thread is a daemon


def _answers(address: str, deadline: float) -> bool:
    """Whether a connection can be made until `deadline`, a time of `time.monotonic`."""
    host, _, port = address.rpartition(":")
    seconds = max(deadline - time.monotonic(), PAUSE_SECONDS)
    try:
        with closing(socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)):
            return True
    except (OSError, UnicodeError):
        return False
