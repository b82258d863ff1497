"""Where a rank reports its steps: the coordinator's address, and the rank of the run.

Not covered: what a rank shows to a coordinator that runs already (`credentials.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Endpoint:
    """Addresses of a coordinator, as HOST:PORT.

    `http` and `pid` are None unless rank 0 started the coordinator.
    """

    grpc: str
    http: str | None = None
    pid: int | None = None
    ca: str = field(default="", repr=False)
    """Certificate of the CA that rank 0 has made for its coordinator, in PEM format; empty: none.
    """
    token: str = field(default="", repr=False)
    """Token that rank 0 has made for its coordinator; empty: none."""

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
    secret: bytes = field(default=b"", repr=False)
    """Proves that a caller belongs to the run; rank 0 has made it."""
