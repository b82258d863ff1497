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
        self._refusal = ""

    def begin(self, reason: str, is_refusal: bool = False) -> bool:
        """Note that the coordinator is away; return whether the run must not go on.

        is_refusal: it is there, and refuses this rank; the user is told so, whatever came before.
        """
        now = time.monotonic()
        if is_refusal and self._since is not None and reason != self._refusal:
            self._say(reason)
        self._refusal = reason if is_refusal else self._refusal
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
            self._since, self._refusal = None, ""
