"""Which rank the others wait for, from what every rank says that it is doing.

Each rank sends a heartbeat about once a second. A rank is *waited for* if it is silent, or if it
stays in one phase while all other ranks wait. It is named in a notice; the run fails only after
the plan's timeout. Times are seconds of the caller's clock.

Not covered: ranks whose stream has broken (`hangs.py`); two ranks that wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from switokd.services.coordinator.ranks import Ranks
from switokd.services.coordinator.rounds import Rounds

NOTICE_SECONDS = 10.0
"""Time without a heartbeat or without progress after which a rank is named; half of the plan's
timeout if that is shorter."""

MARGIN_SECONDS = 2.0
"""How much later than the plan's timeout a run fails: ranks notice a hang in a step by themselves,
and can say more about it."""

AGAIN_SECONDS = 60.0
"""A rank that was named is not named again for this long."""

AFTER_STEP = ("evaluating", "saving")
"""Phases that follow a step, instead of being a part of it."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says. The fields are those of the message `Heartbeat`."""

    phase: str
    step: int
    phase_seconds: float
    still_seconds: float
    waits: bool


def where(phase: str, step: int) -> str:
    """Return phase and step in words: "backward of step 12"."""
    if not step:
        return f"{phase} before the first step"
    return f"{phase} {'after' if phase in AFTER_STEP else 'of'} step {step}"


@dataclass(frozen=True)
class RankHealth:
    """The last heartbeat of a rank."""

    rank: int
    heartbeat: Heartbeat
    age: float
    """Seconds since it arrived."""
    where: str
    """Phase and step, in words."""
    is_silent: bool = False
    is_waited_for: bool = False

    @property
    def phase_seconds(self) -> float:
        """Seconds in the phase, as far as is known."""
        return self.heartbeat.phase_seconds + self.age

    @property
    def still_seconds(self) -> float:
        """Seconds without progress, as far as is known."""
        return self.heartbeat.still_seconds + self.age

    @property
    def waits(self) -> bool:
        """Whether the rank is alive and waits for others."""
        return self.heartbeat.waits and not self.is_silent

    def describe(self) -> str:
        """Say for how long the rank is in its phase: "has been in forward of step 3 for 11 s"."""
        if self.is_silent:
            return (
                f"has sent no heartbeat for {self.age:.0f} s, and was last heard of in {self.where}"
            )
        text = f"has been in {self.where} for {self.phase_seconds:.0f} s"
        if self.still_seconds < self.phase_seconds - 1:
            text += f", without progress for {self.still_seconds:.0f} s"
        return text


class Notice(NamedTuple):
    """A sentence about a rank. reader: the rank that shows it to the user; None: no rank can."""

    text: str
    reader: int | None


class Health:
    """What the ranks of one run are doing. timeout: seconds after which a hang fails the run."""

    def __init__(self, ranks: Ranks, rounds: Rounds, timeout: float) -> None:
        self._ranks, self._rounds, self._timeout = ranks, rounds, timeout
        self._limit = min(NOTICE_SECONDS, timeout / 2)
        self._heartbeats: dict[int, tuple[Heartbeat, float]] = {}
        self._named_at: dict[int, float] = {}
        self._notices: list[Notice] = []
        self.ranks: Sequence[RankHealth] = ()
        """Connected ranks that have sent a heartbeat, as of the last `check`; never changed, so
        that another thread may read it."""

    def beat(self, rank: int, heartbeat: Heartbeat, now: float) -> None:
        """Note a rank's heartbeat."""
        self._heartbeats[rank] = heartbeat, now

    def forget(self, rank: int) -> None:
        """Forget a rank's heartbeat, because its process begins a new stream."""
        self._heartbeats.pop(rank, None)

    def clear(self) -> None:
        """Forget everything, because the run has ended."""
        self._heartbeats, self.ranks = {}, ()

    def check(self, now: float) -> None:
        """Find the ranks that the others wait for, and note what is to be said about them."""
        connected = sorted(self._ranks.connected)
        states = [self._state(r, now) for r in connected if r in self._heartbeats]
        busy = [state for state in states if not state.waits]
        is_stuck = len(connected) == len(states) > len(busy) and all(map(self._is_still, busy))
        before = {state.rank for state in self.ranks if state.is_waited_for}
        self.ranks = tuple(
            s if s.waits else replace(s, is_waited_for=s.is_silent or is_stuck) for s in states
        )
        for state in self._waited_for:
            was_named_at = self._named_at.get(state.rank, -AGAIN_SECONDS)
            if state.rank not in before and now - was_named_at >= AGAIN_SECONDS:
                self._named_at[state.rank] = now
                self._notices.append(self._notice(state))

    def take_notices(self) -> list[Notice]:
        """Return the notices that have come since the last call."""
        notices, self._notices = self._notices, []
        return notices

    def hang(self) -> str | None:
        """Name a rank that the others wait for too long; None if there is none."""
        limit = self._timeout + MARGIN_SECONDS
        waited = max((s.still_seconds for s in self.ranks if s.waits), default=0.0)
        for state in self._waited_for:
            seconds = state.age if state.is_silent else min(state.still_seconds, waited)
            if seconds > limit:
                return f"{self._sentence(state)}: it hangs (coordinator.timeout {self._timeout:g})"
        return None

    def explain(self, now: float) -> str:
        """Return what is known about lost and stuck ranks, to be added to a sentence; or ""."""
        text = ""
        for rank, (heartbeat, heard_at) in sorted(self._heartbeats.items()):
            if rank in self._ranks.lost:
                place = self._where(rank, heartbeat)
                text += f"; it was last heard of in {place}, {max(now - heard_at, 0):.0f} s ago"
        stuck = [s for s in self.ranks if s.is_silent or (not s.waits and self._is_still(s))]
        for state in stuck:
            text += f"; {self._ranks.describe(state.rank)} {state.describe()}"
        return text

    @property
    def _waited_for(self) -> list[RankHealth]:
        return [state for state in self.ranks if state.is_waited_for]

    def sentences(self) -> list[str]:
        """Return a sentence about each rank that the others wait for now."""
        return [self._sentence(state) for state in self._waited_for]

    def _state(self, rank: int, now: float) -> RankHealth:
        heartbeat, heard_at = self._heartbeats[rank]
        age = max(now - heard_at, 0.0)
        is_silent = age > self._limit
        place = (
            self._where(rank, heartbeat) if is_silent else where(heartbeat.phase, heartbeat.step)
        )
        return RankHealth(rank, heartbeat, age, place, is_silent)

    def _where(self, rank: int, heartbeat: Heartbeat) -> str:
        """Return where a silent rank was: its last report may be younger than its heartbeat."""
        reported = self._rounds.step_of(rank)
        is_before = heartbeat.phase in ("loading", "forward", "exchange")
        if reported > heartbeat.step or (reported == heartbeat.step > 0 and is_before):
            return where("deciding", reported)
        return where(heartbeat.phase, heartbeat.step)

    def _is_still(self, state: RankHealth) -> bool:
        return state.still_seconds > self._limit

    def _sentence(self, state: RankHealth) -> str:
        sentence = f"{self._ranks.describe(state.rank)} {state.describe()}"
        waiting = any(other.waits for other in self.ranks)
        return f"{sentence}; the other ranks wait for it" if waiting else sentence

    def _notice(self, state: RankHealth) -> Notice:
        readers = [other.rank for other in self.ranks if not other.is_waited_for]
        return Notice(self._sentence(state), readers[0] if readers else None)
