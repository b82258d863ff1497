"""Says what this process waits for: within 5 s, for how long, and again every 30 s.

`waiting` is for one place that may take long: the coordinator, a lock, a download, a compilation.
`PeerWatch` is for the ranks of a run, which wait for each other in many places; it names the ranks
that the others wait for. Imported without torch.

Not covered: who is late for a wait in which a rank's threads cannot run; waits of torchrun itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from switokd.runtime.environment import describe_rank
from switokd.runtime.lifecycle import print_warning
from switokd.runtime.phase import ACTIVITY, Doing, Phase

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

FIRST_SECONDS = 3.0
"""How long a wait lasts before a line says so."""

AGAIN_SECONDS = 30.0
"""How long it lasts until the next line."""

LOOK_SECONDS = 0.5
"""How often `PeerWatch` looks at what its rank is doing."""

STOP_SECONDS = 1.0
"""How long `PeerWatch.stop` waits for its thread."""

WAITS, STARTING = "waits", "starting"
"""What a rank tells the others of itself while it waits, and before it begins to train."""

IN_TRAINING = {phase.value for phase in Phase} - {Phase.SAVING.value}
"""What ranks do for unequal times in every step and evaluation. The coordinator names a rank that
takes longer than 10 s (`services/coordinator/health.py`)."""

_open: list[tuple[object, str]] = []
"""The waits of this process, and what they are for; only the innermost one speaks."""


def _say(sentence: str) -> None:
    print_warning(sentence, describe_rank(), keep=False)


def _describe(what: str, lasted: float, limit: float | None, hint: str = "") -> str:
    """Describe a wait in one sentence. lasted, limit: in seconds; limit: None if it has none."""
    until = "without a time limit" if limit is None else f"for up to {limit:g} s"
    if lasted > FIRST_SECONDS + AGAIN_SECONDS / 2:
        until = f"{until}, {lasted:.0f} s so far"
    return f"waiting for {what}, {until}{f'; {hint}' if hint else ''}"


@contextmanager
def waiting(
    what: str | Callable[[], str],
    seconds: float | None = None,
    hint: str = "",
    say: Callable[[str], None] = _say,
    first: float | None = None,
) -> Iterator[None]:
    """Say what is waited for, while the body of the `with` statement lasts.

    what: continues "waiting for"; a function is called for each line, on another thread. seconds:
    the longest that the body waits; None: no limit. hint: what the user can check. say: prints.
    first: seconds until the first line; None: `FIRST_SECONDS`.
    The other thread has ended when the body is left.
    """
    is_over, this = threading.Event(), (object(), what if isinstance(what, str) else "")

    def speak() -> None:
        lasted = pause = FIRST_SECONDS if first is None else first
        while not is_over.wait(pause):
            if _open[-1:] == [this]:
                now = what if isinstance(what, str) else what()
                say(_describe(now, lasted, seconds, hint))
            pause = AGAIN_SECONDS
            lasted += pause

    _open.append(this)
    thread = threading.Thread(target=speak, daemon=True, name="waiting")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        _open.remove(this)


def waiting_for_first(items: Iterator[T], what: str) -> Iterator[T]:
    """Yield the items; say what is waited for until the first one is there."""
    with waiting(what):
        first = list(islice(items, 1))
    yield from first
    yield from items


class PeerWatch(threading.Thread):
    """Says which ranks this rank waits for, from its creation until `stop`.

    Every rank notes in the store what it is doing. Of the ranks that wait, the first one speaks,
    unless the others just train.
    store: a clone for this thread alone, because a store serves one caller at a time. seconds: the
    longest wait, where a wait has no limit of its own.
    """

    def __init__(self, store: Store, rank: int, world_size: int, seconds: float) -> None:
        super().__init__(daemon=True, name="waiting for ranks")
        self._store, self._rank, self._seconds = store, rank, seconds
        self._others = [other for other in range(world_size) if other != rank]
        self._is_over = threading.Event()
        self.start()

    def stop(self) -> None:
        """Say nothing more, and end the thread, unless it waits for a store that is cut off."""
        self._is_over.set()
        self.join(STOP_SECONDS)

    def run(self) -> None:
        """Watch; the thread calls this. It ends with the store."""
        noted, due = "", FIRST_SECONDS
        while not self._is_over.wait(LOOK_SECONDS):
            doing = ACTIVITY.now()
            waits_long = doing.waits and doing.still_seconds >= 2 * LOOK_SECONDS
            state = WAITS if waits_long else _now(doing)
            try:
                if state != noted:
                    self._store.set(f"doing/{self._rank}", state)
                    noted = state
                if not waits_long:
                    due = FIRST_SECONDS
                elif doing.still_seconds >= due:
                    has_spoken = self._speak(doing)
                    due = doing.still_seconds + (AGAIN_SECONDS if has_spoken else 2 * LOOK_SECONDS)
            except RuntimeError:  # DistStoreError, DistNetworkError
                return

    def _speak(self, doing: Doing) -> bool:
        """Say who is waited for, if it is for this rank to say; return whether it is."""
        states = {other: self._state_of(other) for other in self._others}
        if any(other < self._rank for other, state in states.items() if state == WAITS):
            return False
        busy = [f"rank {other} ({state})" for other, state in states.items() if state != WAITS]
        what = ", ".join(busy[:4]) + (f" and {len(busy) - 4} more" if len(busy) > 4 else "")
        if not busy and doing.phase is Phase.DECIDING:
            what = f"the coordinator's decision of step {doing.step}"
        elif {*states.values()} <= {WAITS, *IN_TRAINING}:
            return False
        limit = self._seconds if doing.limit is None else doing.limit
        _say(_describe(what, doing.still_seconds, limit))
        return True

    def _state_of(self, rank: int) -> str:
        key = f"doing/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else STARTING


def _now(doing: Doing) -> str:
    """What this rank tells the others of itself while it does not wait for them."""
    for _, what in _open[-1:]:
        return what or STARTING
    return doing.phase.value if doing.step or doing.phase is not Phase.LOADING else STARTING
