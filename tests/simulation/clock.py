"""A virtual clock, and threads under it: greenlets, of which one runs until it waits.

Of the threads that may go on at the same time, the seed chooses the first.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, Protocol

from greenlet import GreenletExit, getcurrent, greenlet


class Process(Protocol):
    """A process of the operating system. Its threads end with it, and stand still if it stops."""

    is_alive: bool
    stopped_until: float


class Task:
    """A thread of a process."""

    def __init__(self, clock: Clock, process: Process, call: Callable[[], None]) -> None:
        self.process, self._call = process, call
        self.greenlet = greenlet(self._run, parent=clock.hub)
        self.wait_number = 0
        """Counts the waits, so that what comes too late for one does not end the next."""
        self.on_end: Callable[[], None] = lambda: None

    def _run(self, _: bool) -> None:
        self._call()
        self.on_end()


class Clock:
    """Calls functions and runs threads at virtual times."""

    def __init__(self, rng: random.Random) -> None:
        self.now, self.rng = 0.0, rng
        self.hub = getcurrent()
        self.current: Task | None = None
        """The thread that runs; None: none."""
        self._heap: list[tuple[float, float, int, Callable[[], None]]] = []
        self._tasks: dict[Task, None] = {}
        self._timed: dict[Task, None] = {}
        """Threads whose waits a clock that jumps would end."""
        self._numbers = count()

    def at(self, delay: float, call: Callable[[], None]) -> None:
        """Call a function after `delay` seconds; those of the same time in this order."""
        self._push(self.now + delay, 0.0, call)

    def start(self, call: Callable[[], None], process: Process) -> Task:
        """Run a thread of a process."""
        task = Task(self, process, call)
        self._tasks[task] = None
        self.wake(task)
        return task

    def wait(self, seconds: float | None = None, hurries: bool = True) -> bool:
        """Let the running thread wait; return whether it was woken before the time was over.

        hurries: whether a jump of the clock ends the wait.
        """
        task = self.current
        assert task is not None, "only a thread can wait"
        if not task.process.is_alive:
            raise GreenletExit
        if seconds is not None:
            self._resume_at(self.now + max(seconds, 0.0), task, False)
            if hurries:
                self._timed[task] = None
        return bool(self.hub.switch())

    def wait_for(self, condition: Callable[[], object], seconds: float, pause: float) -> bool:
        """Let the running thread look every `pause` seconds; return whether the condition holds."""
        end = self.now + seconds
        while not condition():
            if self.now >= end:
                return False
            self.wait(min(pause, end - self.now), hurries=False)
        return True

    def wake(self, task: Task) -> None:
        """Let a thread that waits go on."""
        self._resume_at(self.now, task, True)

    def maybe_switch(self, probability: float) -> None:
        """Sometimes let the other threads go first, as an operating system does."""
        if self.current and self.rng.random() < probability:
            self.wait(0.0, hurries=False)

    def hurry(self) -> bool:
        """Let all waits with a deadline be over: somebody's clock has jumped. False: none."""
        hurried = list(self._timed)
        for task in hurried:
            self._resume_at(self.now, task, False)
        return bool(hurried)

    def step(self) -> bool:
        """Do the next event; return False if there is none."""
        if not self._heap:
            return False
        self.now, _, _, call = heapq.heappop(self._heap)
        call()
        return True

    def kill(self, process: Process) -> None:
        """End a process and all its threads, without another word."""
        process.is_alive = False
        self.at(0.0, lambda: self._end([t for t in self._tasks if t.process is process]))

    def close(self) -> None:
        """End everything."""
        for task in self._tasks:
            task.process.is_alive = False
        self._end(list(self._tasks))

    def _resume_at(self, time: float, task: Task, was_woken: bool) -> None:
        call = partial(self._resume, task, task.wait_number, was_woken)
        self._push(time, self.rng.random(), call)

    def _push(self, time: float, order: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time, order, next(self._numbers), call))

    def _resume(self, task: Task, wait_number: int, was_woken: bool) -> None:
        if task.wait_number != wait_number or not task.process.is_alive:
            return
        if self.now < task.process.stopped_until:
            self._resume_at(task.process.stopped_until, task, was_woken)
            return
        self._switch(task, partial(task.greenlet.switch, was_woken))

    def _end(self, tasks: list[Task]) -> None:
        for task in tasks:
            self._switch(task, partial(task.greenlet.throw, GreenletExit))

    def _switch(self, task: Task, switch: Callable[[], Any]) -> None:
        task.wait_number += 1
        self._timed.pop(task, None)
        self.current = task
        try:
            switch()
        finally:
            self.current = None
        if task.greenlet.dead:
            self._tasks.pop(task, None)
