"""How long the coordinator has been away, what that means for the run, and what the user is told.

Not covered: a coordinator that hangs while its connection holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from switokd.config.sections import Coordinator


class Absence:
    """The coordinator's absence. say: receives a sentence when it begins, and when it ends."""

    def __init__(self, settings: Coordinator, say: Callable[[str], None]) -> None:
        self._on_loss, self._timeout, self._say = settings.on_loss, settings.timeout, say
        self._since: float | None = None

    def begin(self, reason: str) -> bool:
        """Note that the coordinator is away; return whether the run must not go on."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            if self._on_loss != "stop":
                alone = self._on_loss == "decide_alone"
                meanwhile = "the ranks decide alone" if alone else "the ranks wait"
                self._say(f"{reason}; {meanwhile} until it is back (coordinator.on_loss)")
        waited_too_long = self._on_loss == "wait" and now - self._since >= self._timeout
        return self._on_loss == "stop" or waited_too_long

    def end(self, coordinator: str) -> None:
        """Note that the coordinator answers."""
        if self._since is not None:
            self._say(f"{coordinator} is back after {time.monotonic() - self._since:.1f} s")
            self._since = None
