"""The ranks of one run: which have joined, are connected, are lost, have finished.

Not covered: the ranks' reports (`rounds.py`), how long a lost rank may stay away (`hangs.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.text import MOST_NAMES


@dataclass(frozen=True)
class Caller:
    """Who opens a stream. client: identifies the process; attempt: counts its streams."""

    client: str = ""
    attempt: int = 0


NOBODY = Caller()


class Ranks:
    """Ranks of one run. A method that raises `Refusal` changes nothing."""

    def __init__(self, run_id: str, plan: Plan) -> None:
        self._run_id = run_id
        self._plan = plan
        self._joined: set[int] = set()
        self._connected: dict[int, Caller] = {}
        self._lost: dict[int, float] = {}
        self._finished: set[int] = set()
        self.is_stopped = False
        """Whether a rank has left before its last step."""

    @property
    def world_size(self) -> int:
        """Number of ranks that the plan names."""
        return len(self._plan.networks_of)

    @property
    def joined(self) -> Set[int]:
        """Ranks that have joined."""
        return self._joined

    @property
    def connected(self) -> Set[int]:
        """Ranks with an open stream."""
        return self._connected.keys()

    @property
    def lost(self) -> Mapping[int, float]:
        """Ranks whose stream has broken, with the time at which it broke."""
        return self._lost

    @property
    def all_attached(self) -> bool:
        """Whether every rank has an open stream or has finished."""
        return len(self._connected.keys() | self._finished) == self.world_size

    @property
    def all_finished(self) -> bool:
        """Whether every rank has finished its training."""
        return len(self._finished) == self.world_size

    def describe(self, rank: int) -> str:
        """Name a rank with its networks: "rank 1 (teacher2, student)"."""
        return self._plan.describe(rank)

    def describe_others(self, present: Set[int]) -> str:
        """Name all ranks that are not in `present`."""
        return self.describe_all(r for r in self._plan.networks_of if r not in present)

    def describe_all(self, ranks: Iterable[int]) -> str:
        """Name several ranks."""
        named = list(ranks)
        more = f" and {len(named) - MOST_NAMES} more ranks" if len(named) > MOST_NAMES else ""
        return ", ".join(map(self.describe, named[:MOST_NAMES])) + more

    def check(self, rank: int) -> None:
        """Raise Refusal if the run has no such rank."""
        if rank not in self._plan.networks_of:
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"run {self._run_id!r} has ranks 0 to {self.world_size - 1}, not {rank}",
            )

    def join(self, rank: int, plan: Plan) -> None:
        """Add a rank; Refusal if its plan is not the run's plan. Joining twice changes nothing."""
        if plan.config_digest != self._plan.config_digest:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{self.describe(rank)} was started with another configuration than the first "
                f"rank of run {self._run_id!r}: start every rank with the same run file and "
                "settings",
            )
        if plan != self._plan:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{self.describe(rank)} has another plan than the first rank of run "
                f"{self._run_id!r}",
            )
        self._joined.add(rank)

    def attach(self, rank: int, caller: Caller) -> None:
        """Note a rank's open stream, which replaces an earlier one of the same process.

        Refusal if the rank has not joined, or if its stream belongs to another process or is newer.
        """
        if rank not in self._joined:
            # It may have joined the coordinator before this one: it joins again.
            raise Refusal(
                Refusal.Kind.NOT_FOUND,
                f"{self.describe(rank)} must join before its stream",
            )
        now = self._connected.get(rank)
        is_newer = now and now.client == caller.client and now.attempt < caller.attempt
        if (now and not is_newer) or rank in self._finished:
            raise Refusal(
                Refusal.Kind.ALREADY_EXISTS,
                f"{self.describe(rank)} of run {self._run_id!r} has its stream already",
            )
        self._connected[rank] = caller
        self._lost.pop(rank, None)

    def lose(self, rank: int, now: float) -> None:
        """Note that a rank's stream has broken."""
        if self._connected.pop(rank, None):
            self._lost[rank] = now

    def detach(self, rank: int) -> None:
        """Note that a rank's stream has ended for good."""
        self._connected.pop(rank, None)
        self._lost.pop(rank, None)

    def finish(self, rank: int, stopped: bool = False) -> None:
        """Note that a rank has finished its training, or has stopped before the last step."""
        self.detach(rank)
        self._finished.add(rank)
        self.is_stopped |= stopped
