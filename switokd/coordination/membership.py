"""Where a rank reports its steps: the coordinator's address, and the rank of the run.

Not covered: credentials.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoint:
    """Addresses of a coordinator, as HOST:PORT.

    `http` and `pid` are None unless rank 0 started the coordinator.
    """

    grpc: str
    http: str | None = None
    pid: int | None = None

    def __str__(self) -> str:
        return self.grpc if self.pid is None else f"{self.grpc} (process {self.pid})"


@dataclass(frozen=True)
class Membership:
    """One rank's membership in a run at a coordinator."""

    coordinator: Endpoint
    run_id: str
    rank: int
    epoch: int = 0
    """How often the run's processes were started."""
