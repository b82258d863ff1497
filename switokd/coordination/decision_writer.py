"""Hands decisions to the decision log, so that no step waits for a file.

Not covered: the format of the decision log (`run_folder.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from switokd.distillation.decision import Decision
from switokd.errors import SwitokdError


class DecisionWriter:
    """Calls `write` for every decision, in order, on a thread of its own.

    on_error: called on that thread if `write` raises; no later decision is written then.
    """

    def __init__(
        self, write: Callable[[Decision], None], on_error: Callable[[SwitokdError], None]
    ) -> None:
        self._write, self._on_error = write, on_error
        self._queue: SimpleQueue[Decision | None] = SimpleQueue()
        self._error: SwitokdError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="decision writer")
        self._thread.start()

    def put(self, decision: Decision) -> None:
        """Queue a decision; does not wait."""
        self._queue.put(decision)

    def close(self, timeout: float | None) -> SwitokdError | None:
        """Wait until all queued decisions are written; return the error of `write`, once.

        timeout: longest wait in seconds; None: no limit.
        """
        self._queue.put(None)
        self._thread.join(timeout)
        error, self._error = self._error, None
        return error

    def _run(self) -> None:
        try:
            while (decision := self._queue.get()) is not None:
                self._write(decision)
        except Exception as error:  # an exception on this thread would go unnoticed
            reason = f"decisions cannot be recorded: {type(error).__name__}: {error}"
            self._error = error if isinstance(error, SwitokdError) else SwitokdError(reason)
            self._on_error(self._error)
