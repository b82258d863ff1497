"""What this rank is doing now: the phase of its training, and whether it waits for other ranks.

The training loop notes it, and a thread reads it for the heartbeats (`coordination/heartbeat.py`).
A process is one rank, so there is one `ACTIVITY` per process, as there is one set of threads. To
note something costs less than a microsecond: one attribute is replaced, and no lock is taken.

Not covered: what a GPU is doing; a phase begins when the host begins to launch its kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple


class Phase(Enum):
    """A part of the training of one rank; see `Phase` in the wire contract."""

    __hash__ = object.__hash__  # each step looks up several; that of Enum takes longer

    LOADING = "loading"
    FORWARD = "forward"
    EXCHANGE = "exchange"
    DECIDING = "deciding"
    BACKWARD = "backward"
    EVALUATING = "evaluating"
    SAVING = "saving"


class Doing(NamedTuple):
    """What a rank does. step: that of the phase, or the last one before it."""

    phase: Phase
    step: int
    phase_seconds: float
    """Since the phase began."""
    still_seconds: float
    """Since the rank has last got any further."""
    waits: bool
    """Whether the rank waits for other ranks, or for the coordinator."""
    limit: float | None = None
    """The longest that it waits, in seconds; None: the usual limit."""


class _Waiting:
    """A wait of an activity; contextlib would take three times as long."""

    __slots__ = ("_activity",)

    def __init__(self, activity: Activity) -> None:
        self._activity = activity

    def __enter__(self) -> None:
        self._activity.note_wait(1)

    def __exit__(self, *_: object) -> None:
        self._activity.note_wait(-1)


class Activity:
    """What one rank does now. The training thread writes, any thread may read."""

    def __init__(self) -> None:
        self._moved_at = time.monotonic()
        self._phase = Phase.LOADING, 0, self._moved_at
        self._spent = dict.fromkeys(Phase, 0.0)
        """Seconds in each phase since the first `begin`, without the phase that goes on."""
        self._changes = 0
        """Odd while the two above are changed; 0 before the first `begin`."""
        self._waits = 0
        self._waiting = _Waiting(self)
        self._limit: float | None = None
        self.listener: Callable[[Phase, int], None] | None = None
        """Hears of each phase that begins, and of its step, on the thread that trains."""

    def begin(self, phase: Phase, step: int | None = None) -> None:
        """Note that a phase begins. step: None keeps that of the phase before."""
        now = self._moved_at = time.monotonic()
        before, step_before, began_at = self._phase
        self._changes += 1
        self._spent[before] += now - began_at if self._changes > 1 else 0.0
        self._phase = phase, step_before if step is None else step, now
        self._changes += 1
        if self.listener is not None:
            self.listener(phase, self._phase[1])

    def spent(self) -> dict[Phase, float]:
        """Return the seconds that the process has spent in each phase since the first `begin`."""
        while True:
            changes = self._changes
            (phase, _, began_at), spent = self._phase, dict(self._spent)
            if changes == self._changes and changes % 2 == 0:  # else a phase has begun meanwhile
                spent[phase] += time.monotonic() - began_at if changes else 0.0
                return spent

    def progress(self) -> None:
        """Note that the rank has got further in its phase, such as by one batch."""
        self._moved_at = time.monotonic()

    def waiting(self, limit: float | None = None) -> _Waiting:
        """Note that the rank waits for others in the body of the `with` statement.

        limit: the longest that it waits, in seconds; None: the usual limit.
        """
        self._limit = limit
        return self._waiting

    def note_wait(self, change: int) -> None:
        """Note that a wait begins (1) or ends (-1)."""
        self._waits += change
        self._moved_at = time.monotonic()

    def now(self) -> Doing:
        """Return what the rank does now."""
        phase, step, began_at = self._phase
        now = time.monotonic()
        waits = self._waits > 0
        limit = self._limit if waits else None
        return Doing(phase, step, now - began_at, now - self._moved_at, waits, limit)


ACTIVITY = Activity()
"""What this process does."""
