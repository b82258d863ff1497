"""TensorBoard: event files in RUN_FOLDER/tensorboard.

A run that continues after step N declares the rows after N void: TensorBoard then shows each step
once.

Not covered: the numbers and their names (`numbers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from switokd.runs.trackers.tracker import Tracker, optional
from switokd.training.observer import ObservedRun

FOLDER = "tensorboard"


class TensorBoard(Tracker):
    """Writes event files.

    flush_seconds: how long rows may wait in memory. UsageError if TensorBoard is not installed.
    """

    def __init__(self, flush_seconds: int = 10) -> None:
        super().__init__()
        self._module = optional("torch.utils.tensorboard", "tensorboard")
        self._flush_seconds = flush_seconds

    def open(self, run: ObservedRun) -> None:
        """Begin a new event file."""
        folder = str(run.folder / FOLDER)
        first = run.step + 1 if run.step or (run.folder / FOLDER).exists() else None
        self._writer = self._module.SummaryWriter(
            folder, purge_step=first, flush_secs=self._flush_seconds
        )
        if first is None:
            text = "".join(f"    {line}\n" for line in run.config.dump().splitlines())
            self._writer.add_text("configuration", text, 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar per number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write what waits in memory."""
        self._writer.flush()

    def close(self, error: BaseException | None) -> None:
        """Write the rest of the file."""
        self._writer.close()
