"""The roles of callers: who may command a run, and who may stop the coordinator.

Not covered: how a caller proves who it is (`identity.py`).
"""

from __future__ import annotations

from enum import Enum

from switokd.services.coordinator.refusal import Refusal


class CallerRole(Enum):
    """What a caller may do. An operator may do all that a worker may."""

    WORKER = "worker"
    """It has shown a worker's token."""
    OPERATOR = "operator"
    """It has shown an operator's token."""
    RUN = "run"
    """It has shown the secret of the run that it commands."""


def may_command(has_secret: bool, is_operator: bool) -> CallerRole:
    """Return the role of who commands a run; Refusal if the caller has none.

    has_secret: whether it has shown the run's secret. is_operator: whether its credentials are an
    operator's.
    """
    if is_operator:
        return CallerRole.OPERATOR
    if has_secret:
        return CallerRole.RUN
    raise Refusal(
        Refusal.Kind.PERMISSION_DENIED,
        "only an operator, or who has the run's secret (run.json in the run folder), may command "
        "a run",
    )


def check_drain(is_operator: bool) -> None:
    """Raise Refusal unless an operator asks for the end of the coordinator."""
    if not is_operator:
        raise Refusal(
            Refusal.Kind.PERMISSION_DENIED,
            "only an operator may drain a coordinator; on its machine SIGTERM does the same",
        )
