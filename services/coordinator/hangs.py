"""Finds the ranks that a run waits for: ranks that hang or are cut off.

Not covered: ranks whose stream breaks (`run.py`).
"""

from __future__ import annotations

from collections.abc import Set

from switokd.services.coordinator.ranks import Ranks
from switokd.services.coordinator.rounds import Rounds

STALL_SECONDS = 1.0
"""Within this time of each other, all ranks notice that a collective has failed."""


class HangDetector:
    """Names the ranks that a run has waited for too long.

    timeout: seconds to wait for the streams of all ranks, or for all reports of a step. now: time
    in seconds at which the run was created.
    """

    def __init__(self, ranks: Ranks, rounds: Rounds, timeout: float, now: float) -> None:
        self._ranks = ranks
        self._rounds = rounds
        self._timeout = timeout
        self._created_at = now
        self._stalled: dict[int, str] = {}
        self._stalled_at = 0.0

    def stall(self, rank: int, doing: str, now: float) -> None:
        """Note that a rank's collective failed. doing: what the rank waited for."""
        if not self._stalled:
            self._stalled_at = now
        self._stalled[rank] = doing

    def describe(self, is_joining: bool, now: float) -> str | None:
        """Name the ranks that hang; None if no rank does.

        is_joining: whether the run still waits for streams.
        """
        if self._stalled:
            return self._describe_silent() if now - self._stalled_at > STALL_SECONDS else None
        if is_joining:
            return self._describe_late("no stream", self._created_at, self._ranks.connected, now)
        if oldest := self._rounds.oldest:
            return self._describe_late(
                f"no report of step {oldest.step}", oldest.opened_at, oldest.reported, now
            )
        return None

    def _describe_late(
        self, missing: str, waiting_since: float, present: Set[int], now: float
    ) -> str | None:
        """Name the ranks that are not in `present`, if the timeout is over."""
        if now - waiting_since <= self._timeout:
            return None
        return (
            f"{missing} from {self._ranks.describe_others(present)} within {self._timeout:g} s of "
            "the first rank's: it hangs, or its machine is cut off"
        )

    def _describe_silent(self) -> str:
        """Name the connected ranks whose collective has not failed: all others wait for them."""
        doing = next(iter(self._stalled.values()))
        silent = sorted(self._ranks.connected - self._stalled.keys())
        if not silent:
            return f"every rank failed {doing}"
        fault = "it hangs" if len(silent) == 1 else "one of them hangs"
        names = self._ranks.describe_all(silent)
        return f"{names} did not answer while the other ranks were {doing}: {fault}"
