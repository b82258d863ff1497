"""The checkpoints of a run folder: checkpoints/step-N with state.pt, run.json and SHA256SUMS.

A checkpoint is written into a hidden folder, put on the disk and then renamed. A folder with its
final name is therefore complete, or was damaged later; its checksums show that.

Not covered: the content of the state (`training/checkpoint.py`).
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from switokd.errors import UsageError, first_line
from switokd.models.own_state import unplain
from switokd.runtime.durable import read_checked, read_sums, sync_folder, write_with_sum

FILES = ("state.pt", "run.json")


@dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint on the disk."""

    path: Path
    step: int

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the state and the content of run.json.

        UsageError, with the reason, if a file is missing or damaged.
        """
        missing = [name for name in FILES if name not in read_sums(self.path)]
        if missing:
            raise UsageError(f"{self.path} has no checksum of {missing[0]}")
        try:
            state, run = (read_checked(self.path / name) for name in FILES)
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from None
        loaded = torch.load(BytesIO(state), map_location="cpu", weights_only=True)
        return loaded, json.loads(run)


def stored(folder: Path) -> list[StoredCheckpoint]:
    """Return the checkpoints of a run folder, the newest first."""
    names = folder.glob("checkpoints/step-*")
    steps = {path: path.name.removeprefix("step-") for path in names if path.is_dir()}
    found = [StoredCheckpoint(path, int(step)) for path, step in steps.items() if step.isdigit()]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def write(folder: Path, step: int, state: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Write one checkpoint; OSError if the disk is full, UsageError if it could not be loaded."""
    top = folder / "checkpoints"
    partial, path = top / f".step-{step:09d}.partial", top / f"step-{step:09d}"
    check_plain(state)
    buffer = BytesIO()
    torch.save(dict(state), buffer)
    for old in (partial, path):
        shutil.rmtree(old, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_with_sum(partial, "state.pt", buffer.getbuffer())
        write_with_sum(partial, "run.json", (json.dumps(run, indent=2) + "\n").encode())
        partial.rename(path)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(top)


def check_plain(value: Any) -> None:
    """UsageError if loading a value would need code: a type that is not PyTorch's or plain."""
    if name := unplain(value):
        raise UsageError(
            f"the state of a network or strategy holds a {name}; allowed are tensors, numbers, "
            "texts, lists and dicts"
        )


def remove(checkpoint: StoredCheckpoint) -> None:
    """Remove a checkpoint; after a crash in between, its name shows that it is incomplete."""
    partial = checkpoint.path.with_name(f".{checkpoint.path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.path.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


class CheckpointWriter:
    """Writes checkpoints on a thread of its own, while training goes on.

    keep: number of checkpoints that stay. before: called on the thread before a checkpoint is
    written; puts the record up to the given step on the disk. on_error: receives one sentence if a
    checkpoint cannot be written; training goes on.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        before: Callable[[int], None],
        on_error: Callable[[str], None],
    ) -> None:
        self._folder, self._keep, self._before, self._on_error = folder, keep, before, on_error
        self._jobs: Queue[tuple[int, Mapping[str, Any], Mapping[str, Any]] | None] = Queue(1)
        self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoints")
        self._thread.start()

    def put(self, step: int, state: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Queue a checkpoint; waits only if two earlier ones are not written yet."""
        self._jobs.put((step, state, run))

    def close(self) -> None:
        """Wait until all queued checkpoints are written; later calls do nothing."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._write(*job)

    def _write(self, step: int, state: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        try:
            self._before(step)
            write(self._folder, step, state, run)
            for old in stored(self._folder)[self._keep :]:
                remove(old)
        except Exception as error:  # an exception on this thread would go unnoticed
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            last = next(iter(stored(self._folder)), None)
            self._on_error(
                f"the checkpoint of step {step} cannot be written: {reason}; "
                + (f"the last checkpoint is of step {last.step}" if last else "there is none yet")
            )
