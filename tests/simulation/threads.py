"""Python's threads, locks, queues and times under the virtual clock.

`installed` puts them into the modules of `switokd.coordination`, whose code is not changed. A lock,
or a queue, may let other threads go first: that is how races are tried.

Not covered: races between two operations that take no lock.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from tests.simulation.clock import Clock, Task

SWITCHES = 0.1
"""How often another thread goes first."""


class Threads:
    """Python's modules and classes, by the names that the simulated code has for them."""

    def __init__(self, clock: Clock) -> None:
        self.threading = SimpleNamespace(
            Thread=lambda **kwargs: Thread(clock, **kwargs),
            Condition=lambda: Condition(clock),
            Event=lambda: Event(clock),
        )
        now = lambda: clock.now  # noqa: E731
        clocks = dict.fromkeys(("monotonic", "perf_counter", "time"), now)
        self.time = SimpleNamespace(**clocks, sleep=clock.wait)
        self.SimpleQueue = lambda: SimpleQueue(clock)

    def replacements(self) -> dict[Any, Any]:
        """What stands for what."""
        return {
            threading: self.threading,
            time: self.time,
            queue.SimpleQueue: self.SimpleQueue,
        }


@contextmanager
def installed(
    replacements: Mapping[Any, Any], room: str = "switokd.coordination"
) -> Iterator[None]:
    """Put other objects into the modules of a room, wherever they name the real ones."""
    by_id = {id(real): other for real, other in replacements.items()}
    modules = [m for name, m in sys.modules.items() if name.startswith(f"{room}.")]
    real = [(m, k, v) for m in modules for k, v in vars(m).items() if id(v) in by_id]
    for module, name, value in real:
        setattr(module, name, by_id[id(value)])
    try:
        yield
    finally:
        for module, name, value in real:
            setattr(module, name, value)


class Condition:
    """threading.Condition with its lock, which one thread may take several times."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._owner: Task | None = None
        self._depth = 0
        self._blocked: deque[Task] = deque()
        self._waiting: list[Task] = []

    def __enter__(self) -> Condition:
        self._clock.maybe_switch(SWITCHES)
        self._acquire(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._release()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for `notify_all`; return False if the time is over before."""
        task, depth = self._running, self._depth
        assert self._owner is task, "waits without the lock"
        self._waiting.append(task)
        self._release()
        was_woken = self._clock.wait(seconds)
        if task in self._waiting:
            self._waiting.remove(task)
        self._acquire(depth)
        return was_woken

    def wait_for(self, predicate: Callable[[], Any], seconds: float | None = None) -> Any:
        """Wait for a condition; return its last value."""
        end = None if seconds is None else self._clock.now + seconds
        while not (result := predicate()):
            left = None if end is None else end - self._clock.now
            if (left is not None and left <= 0) or not self.wait(left):
                return predicate()
        return result

    def notify_all(self) -> None:
        """Wake all that wait."""
        assert self._owner is self._running, "notifies without the lock"
        for task in self._waiting:
            self._clock.wake(task)
        self._waiting.clear()

    @property
    def _running(self) -> Task:
        assert self._clock.current is not None
        return self._clock.current

    def _acquire(self, depth: int) -> None:
        task = self._running
        while self._owner not in (None, task):
            if task not in self._blocked:
                self._blocked.append(task)
            self._clock.wait()
        self._owner, self._depth = task, self._depth + depth

    def _release(self) -> None:
        self._owner, self._depth = None, 0
        if self._blocked:
            self._clock.wake(self._blocked.popleft())


class Event:
    """threading.Event."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._is_set = clock, False
        self._waiting: list[Task] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        for task in self._waiting:
            self._clock.wake(task)
        self._waiting.clear()

    def wait(self, seconds: float | None = None) -> bool:
        if not self._is_set:
            task = self._clock.current
            assert task is not None
            self._waiting.append(task)
            self._clock.wait(seconds)
            if task in self._waiting:
                self._waiting.remove(task)
        return self._is_set


class SimpleQueue:
    """queue.SimpleQueue; its readers wait in turn. switches: how often the others go first."""

    def __init__(self, clock: Clock, switches: float = SWITCHES) -> None:
        self._clock, self._switches = clock, switches
        self._items: deque[Any] = deque()
        self._waiting: deque[Task] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._waiting:
            self._clock.wake(self._waiting.popleft())
        self._clock.maybe_switch(self._switches)

    def get(self) -> Any:
        while not self._items:
            assert self._clock.current is not None
            self._waiting.append(self._clock.current)
            self._clock.wait()
        return self._items.popleft()


class Thread:
    """threading.Thread: a thread of the process that starts it."""

    def __init__(
        self, clock: Clock, target: Callable[[], None], daemon: bool = True, name: str = ""
    ) -> None:
        assert daemon, f"thread {name} would keep its process from ending"
        self._clock, self._target = clock, target
        self._is_over = Event(clock)

    def start(self) -> None:
        assert self._clock.current is not None
        task = self._clock.start(self._target, self._clock.current.process)
        task.on_end = self._is_over.set

    def join(self, seconds: float | None = None) -> None:
        self._is_over.wait(seconds)
