"""What this process uses: memory, GPU memory, and the disk of its run folder.

A process is one rank, so there is one `USAGE` per process. Nothing here waits for a GPU. A thread
of its own asks for the free space: the disk of a run may hang, and heartbeats must go on.

Not covered: the time of each phase (`phase.py`); other processes of the machine.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOOK_SECONDS = 5.0
"""How often the free space is looked at."""


class ProcessUsage:
    """What a process uses, in bytes; None for what is not known."""

    def __init__(self) -> None:
        self.disk_free: int | None = None
        """Free space where the run folder is."""

    @contextmanager
    def watching(self, folder: Path | None) -> Iterator[None]:
        """Keep `disk_free` up to date in the body of the `with` statement. None: no folder."""
        if folder is None:
            yield
            return
        is_over = threading.Event()
        look = threading.Thread(
            target=self._look, args=(folder, is_over), daemon=True, name="free space"
        )
        look.start()
        try:
            yield
        finally:
            is_over.set()
            self.disk_free = None

    def _look(self, folder: Path, is_over: threading.Event) -> None:
        while not is_over.is_set():
            found = free_bytes(folder)
            if not is_over.is_set():
                self.disk_free = found
            is_over.wait(LOOK_SECONDS)


USAGE = ProcessUsage()
"""What this process uses."""


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes of a folder's file system for this user."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def memory_bytes() -> int | None:
    """Return the resident memory of this process."""
    try:
        pages = Path("/proc/self/statm").read_bytes().split()[1]
    except OSError:  # not Linux
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def gpu_memory_bytes() -> int | None:
    """Return the memory that PyTorch holds for this process on its GPUs; None: it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    reserved = (torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count()))
    return sum(map(int, reserved))
