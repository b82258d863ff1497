"""A virtual clock: processes are generators that yield what they wait for."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import count

FOR_EVER = 1e9


@dataclass(frozen=True)
class Until:
    """Wait for a condition, for `timeout` virtual seconds at most; sends whether it holds."""

    condition: Callable[[], bool]
    timeout: float = FOR_EVER


Process = Generator[Until, bool, None]


@dataclass
class Waiting:
    """A process that waits."""

    process: Process
    until: Until
    deadline: float
    is_alive: Callable[[], bool]


@dataclass
class Clock:
    """Calls functions and runs processes at virtual times."""

    now: float = 0.0
    _heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _waiting: list[Waiting] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)

    def at(self, delay: float, call: Callable[[], None]) -> None:
        """Call a function after `delay` seconds."""
        heapq.heappush(self._heap, (self.now + delay, next(self._numbers), call))

    def start(self, process: Process, is_alive: Callable[[], bool] = lambda: True) -> None:
        """Run a process for as long as `is_alive` says so."""
        self._advance(Waiting(process, Until(lambda: True), self.now, is_alive), None)

    def hurry(self) -> bool:
        """Let all waits with a deadline be over: somebody's clock has jumped. False: none."""
        hurried = [w for w in self._waiting if w.until.timeout < FOR_EVER and w.deadline > self.now]
        for waiting in hurried:
            waiting.deadline = self.now
        return bool(hurried)

    def step(self) -> bool:
        """Do the next event; return False if there is none."""
        deadline = min((w.deadline for w in self._waiting), default=FOR_EVER)
        if self._heap and self._heap[0][0] <= deadline:
            self.now, _, call = heapq.heappop(self._heap)
            call()
        elif deadline < FOR_EVER:
            self.now = max(self.now, deadline)
        else:
            return False
        while self._wake():
            pass
        return True

    def _wake(self) -> bool:
        """Go on with the first process whose wait is over."""
        for i, waiting in enumerate(self._waiting):
            if not waiting.is_alive():
                del self._waiting[i]
                return True
            if (holds := waiting.until.condition()) or self.now >= waiting.deadline:
                del self._waiting[i]
                self._advance(waiting, holds)
                return True
        return False

    def _advance(self, waiting: Waiting, holds: bool | None) -> None:
        try:
            until = next(waiting.process) if holds is None else waiting.process.send(holds)
        except StopIteration:
            return
        deadline = self.now + until.timeout
        self._waiting.append(Waiting(waiting.process, until, deadline, waiting.is_alive))


def never() -> bool:
    """A condition for a plain pause."""
    return False


def pause(seconds: float) -> Until:
    """Wait for some time."""
    return Until(never, seconds)
