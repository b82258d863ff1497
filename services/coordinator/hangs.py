"""Finds the ranks that a run waits for: ranks that hang, are gone or are cut off.

A rank whose stream breaks may open a new one. While the others report new steps the rank is there,
because every step needs all ranks.

What each rank says that it is doing is looked at in `health.py`.

Not covered: a rank that lives but cannot reach the coordinator while the others evaluate.
"""

from __future__ import annotations

from collections.abc import Set

from switokd.services.coordinator.ranks import Ranks
from switokd.services.coordinator.rounds import Rounds

STALL_SECONDS = 1.0
"""Within this time of each other, all ranks notice that a collective has failed."""


LOST_SECONDS = 5.0
"""How long a rank whose stream has broken may stay away, from the last report of any rank on."""


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
        self._is_expecting = False
        """Whether the run is of a journal, and not all ranks have come back yet."""
        self._stalled: dict[int, str] = {}
        self._stalled_at = 0.0

    def expect_all(self, now: float) -> None:
        """Expect streams of all ranks within the timeout, also if the run has decided steps."""
        self._created_at, self._is_expecting = now, True

    def stall(self, rank: int, doing: str, now: float) -> None:
        """Note that a rank's collective failed. doing: what the rank waited for."""
        if not self._stalled:
            self._stalled_at = now
        self._stalled[rank] = doing

    def describe(self, is_joining: bool, now: float) -> str | None:
        """Name the ranks that hang; None if no rank does.

        is_joining: whether the run still waits for streams.
        """
        if lost := self._describe_lost(now):
            return lost
        if self._stalled:
            return self._describe_silent() if now - self._stalled_at > STALL_SECONDS else None
        if self._ranks.all_attached:
            self._is_expecting = False
        if is_joining or self._is_expecting:
            return self._describe_late("no stream", self._created_at, self._ranks.connected, now)
        if oldest := self._rounds.oldest:
            return self._describe_late(
                f"no report of step {oldest.step}", oldest.opened_at, oldest.reported, now
            )
        return None

    def _describe_lost(self, now: float) -> str | None:
        """Name the first rank that is away for too long, or that the other ranks miss already."""
        for rank, lost_at in self._ranks.lost.items():
            alive_at = max(lost_at, self._rounds.reported_at)
            if self._stalled.keys() - {rank} or now - alive_at > LOST_SECONDS:
                step = self._rounds.step_of(rank)
                return f"{self._ranks.describe(rank)} went away after reporting step {step}"
        return None

    def _describe_late(
        self, missing: str, waiting_since: float, present: Set[int], now: float
    ) -> str | None:
        """Name the ranks that are neither in `present` nor lost, if the timeout is over."""
        present = present | self._ranks.lost.keys()
        if now - waiting_since <= self._timeout or len(present) == self._ranks.world_size:
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
