"""The error for a message that the coordinator refuses.

Not covered: the gRPC status that a refusal becomes (`messages.py`).
"""

from __future__ import annotations

from enum import Enum

from switokd.services.coordinator.text import sentence


class Refusal(Exception):
    """A message does not fit the run, or the run's plan is wrong.

    kind: kind of mistake. reason: one sentence for the user; a long one is cut.
    """

    class Kind(Enum):
        """Kind of mistake, named like the gRPC status code."""

        INVALID_ARGUMENT = "invalid argument"
        NOT_FOUND = "not found"
        ALREADY_EXISTS = "already exists"
        FAILED_PRECONDITION = "failed precondition"
        UNAVAILABLE = "unavailable"
        RESOURCE_EXHAUSTED = "resource exhausted"
        PERMISSION_DENIED = "permission denied"

    def __init__(self, kind: Refusal.Kind, reason: str) -> None:
        super().__init__(sentence(reason))
        self.kind = kind
