"""The ranks of one run: which have joined, are connected, have finished.

Not covered: the ranks' reports (`rounds.py`), ranks that reconnect.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal


class Ranks:
    """Ranks of one run. A method that raises `Refusal` changes nothing."""

    def __init__(self, run_id: str, plan: Plan) -> None:
        self._run_id = run_id
        self._plan = plan
        self._joined: set[int] = set()
        self._connected: set[int] = set()
        self._finished: set[int] = set()

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
        return self._connected

    @property
    def all_attached(self) -> bool:
        """Whether every rank has an open stream or has finished."""
        return len(self._connected | self._finished) == self.world_size

    @property
    def all_finished(self) -> bool:
        """Whether every rank has finished its training."""
        return len(self._finished) == self.world_size

    def describe(self, rank: int) -> str:
        """Name a rank with its networks: "rank 1 (teacher2, student)"."""
        return f"rank {rank} ({', '.join(self._plan.networks_of[rank])})"

    def describe_others(self, present: Set[int]) -> str:
        """Name all ranks that are not in `present`."""
        return self.describe_all(r for r in self._plan.networks_of if r not in present)

    def describe_all(self, ranks: Iterable[int]) -> str:
        """Name several ranks."""
        return ", ".join(map(self.describe, ranks))

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

    def attach(self, rank: int) -> None:
        """Note a rank's open stream; Refusal if the rank has not joined or has a stream already."""
        if rank not in self._joined:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{self.describe(rank)} must join before its stream",
            )
        if rank in self._connected or rank in self._finished:
            raise Refusal(
                Refusal.Kind.ALREADY_EXISTS,
                f"{self.describe(rank)} of run {self._run_id!r} has its stream already",
            )
        self._connected.add(rank)

    def detach(self, rank: int) -> None:
        """Note that a rank's stream has ended."""
        self._connected.discard(rank)

    def finish(self, rank: int) -> None:
        """Note that a rank has finished its training."""
        self._connected.discard(rank)
        self._finished.add(rank)
