"""The base class of all trackers: events of a training become rows of numbers by name.

Rows are written on a thread of their own, so that neither a disk nor a server delays a step.

Not covered: the numbers and their names (`numbers.py`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from switokd.distillation.decision import Decision
from switokd.errors import UsageError, summary
from switokd.runs.trackers.numbers import BatchNumbers, DecisionMeans, of_epoch
from switokd.runtime.lifecycle import Terminated
from switokd.runtime.waiting import waiting
from switokd.training.metrics import EpochMetrics
from switokd.training.observer import ObservedRun, Observer
from switokd.training.step import StepResult

END_SECONDS, STOP_SECONDS = 60.0, 5.0
"""How long the end of a run waits for its last rows: of one that finishes, or that is stopped."""


class TrackerRow:
    """The numbers of one step while they are collected."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.values: dict[str, float] = {}
        self.batch: BatchNumbers | None = None
        self.has_decisions = self.has_batch = False

    @property
    def is_whole(self) -> bool:
        """Whether decisions and batch of the step are there; the decision may come later."""
        return self.has_decisions and self.has_batch

    def read(self) -> dict[str, float]:
        """Return all numbers; waits for the device of the batch."""
        return {**self.values, **(self.batch.read() if self.batch else {})}


class Tracker(Observer):
    """Writes rows of numbers, each with its step; a subclass says where to.

    A subclass overrides `open`, `log` and `close`. What they raise reaches whoever calls the
    tracker next. Steps ascend. A run that was interrupted does the steps after its checkpoint
    again, with the same numbers as before.
    """

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        """By name of a number: the last step that an earlier process of the run has written, so
        that it is not written again. Set by `open`; empty where numbers replace earlier ones."""
        self._rows: dict[int, TrackerRow] = {}
        self._means = DecisionMeans()
        self._queue: queue.SimpleQueue[TrackerRow | Callable[[], None] | None]
        self._queue = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def open(self, run: ObservedRun) -> None:
        """Prepare to write, or continue what an earlier process of the run has written."""
        return

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of one step by name; called on the tracker's thread."""
        raise NotImplementedError

    def flush(self) -> None:
        """Put on the disk what was written; called on the tracker's thread at checkpoints."""
        return

    def close(self, error: BaseException | None) -> None:
        """Finish what was written; error: why the run ends early, None if it has finished."""
        return

    def on_run(self, run: ObservedRun) -> None:
        """Open the tracker, and start its thread."""
        self._run, self._every = run, run.config.tracking.every_steps
        self.open(run)
        self._thread = threading.Thread(target=self._write, daemon=True, name="tracker")
        self._thread.start()

    def on_decision(self, decision: Decision) -> None:
        """Add the decision to the means; a row has those of its steps."""
        self._check()
        self._means.add(decision)
        if self._is_row(decision.step):
            row = self._row(decision.step)
            row.values.update(self._means.take())
            row.has_decisions = True

    def on_step(self, step: int, epoch: int, result: StepResult) -> None:
        """Compute the numbers of a row's batch, and write the rows before it that are whole."""
        self._check()
        self._send_whole(step - 1)
        if self._is_row(step):
            row = self._row(step)
            row.batch, row.has_batch = BatchNumbers(self._run.config, result), True

    def on_skipped(self, step: int, reason: str) -> None:
        """Let the row of a skipped step have no batch."""
        if self._is_row(step):
            self._row(step).has_batch = True

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Write the epoch's numbers in the row of its last step."""
        self._check()
        self._row(metrics.step).values.update(of_epoch(metrics))
        self._send(metrics.step)  # all decisions of the epoch are here

    def on_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the rows so far: a run that continues from here does not give them again."""
        self._check()
        self._send(step)  # all decisions up to the step are here
        self._queue.put(self.flush)

    def settle(self) -> None:
        """Wait until the rows so far are written."""
        self._drain(STOP_SECONDS)

    def on_end(self, error: BaseException | None) -> None:
        """Write the last rows, and close the tracker."""
        if self._thread is None:
            return
        self._send(max(self._rows, default=0))
        is_stopped = isinstance(error, Terminated)
        try:
            self._drain(STOP_SECONDS if is_stopped else END_SECONDS)
        finally:
            self._queue.put(None)
        self.close(error)

    def _is_row(self, step: int) -> bool:
        return step % self._every == 0 or step == self._run.steps

    def _row(self, step: int) -> TrackerRow:
        return self._rows.setdefault(step, TrackerRow(step))

    def _send_whole(self, last: int) -> None:
        """Hand rows up to the step `last` to the thread, in order, if they are whole.

        An epoch's numbers join the row of its last step; a row therefore waits for the next step.
        """
        whole = 0
        for step in sorted(step for step in self._rows if step <= last):
            if not self._rows[step].is_whole:  # its decision travels
                break
            whole = step
        if whole:
            self._send(whole)

    def _send(self, last: int) -> None:
        """Hand all rows up to the step `last` to the thread, in order."""
        for step in sorted(step for step in self._rows if step <= last):
            self._queue.put(self._rows.pop(step))

    def _write(self) -> None:
        """Do the thread's work until the end; after an error nothing more, but nobody waits."""
        while (item := self._queue.get()) is not None:
            if self._failure is None or not isinstance(item, TrackerRow):
                self._do(item)

    def _do(self, item: TrackerRow | Callable[[], None]) -> None:
        try:
            if isinstance(item, TrackerRow):
                values = item.read().items()
                new = {name: v for name, v in values if item.step > self.last.get(name, -1)}
                if new:
                    self.log(item.step, new)
            else:
                item()
        except Exception as error:
            self._failure = error

    def _drain(self, seconds: float) -> None:
        """Wait until the rows so far are written; TimeoutError after so many seconds."""
        is_written = threading.Event()
        self._queue.put(is_written.set)
        with waiting(f"{type(self).__name__} to write its last rows", seconds):
            if not is_written.wait(seconds):
                raise TimeoutError(f"the last rows were not written within {seconds:g} s")
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


def optional(module: str, extra: str) -> Any:
    """Import a module that an extra installs; UsageError if that is not possible."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            f"observers: {extra} cannot be imported ({summary(error)}); pip install "
            f"'switokd[{extra}]'"
        ) from None
