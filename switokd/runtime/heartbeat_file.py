"""Lets an orchestrator see that a rank is alive: a file that the rank touches every second.

The variable `FOLDER` names a folder; rank 3 touches `rank-3` in it, and removes it when it ends.
A rank that is stopped, or one of whose threads lets no other run, touches nothing. The probes of
Kubernetes look at the times of these files (`deploying/pods.py`).

Not covered: a rank that lives but gets no further; the coordinator names it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FOLDER = "SWITOKD_HEARTBEAT_FOLDER"
"""Environment variable with the folder of the files; without it there are none."""

INTERVAL_SECONDS = 1.0
"""Time between two touches."""


def name_of(rank: int | str) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank}"


@contextmanager
def heartbeat_file(rank: int) -> Iterator[None]:
    """Touch the file of a rank until the end of the `with` statement, and remove it then."""
    folder = os.environ.get(FOLDER)
    if not folder:
        yield
        return
    path, is_over = Path(folder, name_of(rank)), threading.Event()
    with suppress(OSError):  # the probe will tell
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    thread = threading.Thread(target=_touch, args=(path, is_over), daemon=True, name="alive")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _touch(path: Path, is_over: threading.Event) -> None:
    while not is_over.wait(INTERVAL_SECONDS):
        with suppress(OSError):
            path.touch()
