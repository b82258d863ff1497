"""The files of trained weights, with their checksums. A full disk does not end the training.

A file that the disk does not take waits in memory; a newer state of the same network replaces it.

Not covered: reading them (`export/trained.py`); checkpoints (`checkpoints.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from switokd.runtime.durable import write_with_sum


class WeightsFiles:
    """Weights in a run folder. Methods may be called on several threads.

    on_warning: receives a sentence if a file has to wait.
    """

    def __init__(self, run_folder: Path, on_warning: Callable[[str], None]) -> None:
        self._run_folder, self._on_warning = run_folder, on_warning
        self._lock = threading.Lock()
        self._waiting: dict[Path, memoryview] = {}

    def save(self, states: Mapping[str, Mapping[str, Tensor]], folder: str) -> None:
        """Write the state dict of each network to `folder`/NAME.pt, or let it wait.

        An existing file is replaced after the new file is complete, and the file's checksum is
        noted in SHA256SUMS.
        """
        buffers = {name: BytesIO() for name in states}
        for name, buffer in buffers.items():  # to a file it would hide the OSError of a full disk
            torch.save(dict(states[name]), buffer)
        with self._lock:
            for name, buffer in buffers.items():
                self._waiting[self._run_folder / folder / f"{name}.pt"] = buffer.getbuffer()
            try:
                self._write()
            except OSError as error:
                self._on_warning(
                    f"{self._run_folder / folder} cannot be written: {error.strerror}; training "
                    "goes on, and its weights are kept in memory"
                )

    def sync(self) -> None:
        """Write what waits; OSError if it does not fit."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        for path, content in [*self._waiting.items()]:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_with_sum(path.parent, path.name, content)
            del self._waiting[path]
