"""The setting `placement`: a name, or a table of networks and ranks.

Not covered: the table itself (`runtime/placement.py`); whether the networks of a table are those
of the run (`checks.py`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Union

from pydantic import BeforeValidator

from switokd.runtime.placement import Placement


def _check_placement(value: Any) -> Any:
    """Return a valid placement; ValueError otherwise.

    Checked before pydantic's union, which would report one error for every member type.
    """
    if isinstance(value, dict):
        try:
            Placement.of({name: ranks_of_row(row) for name, row in value.items()})
        except ValueError as error:
            raise ValueError(f"a table {{NETWORK: [RANK, ...]}}: {error}") from None
    elif value not in ("dedicated", "replicated", "auto"):
        raise ValueError("dedicated, replicated, auto, or a table {NETWORK: [RANK, ...]}")
    return value


def ranks_of_row(row: Any) -> list[int] | dict[int, float]:
    """Read one network's ranks: a list, or {rank: weight} with keys that JSON has made text.

    ValueError for anything else, or if a rank is given twice.
    """
    message = f"a network's ranks are [0, 1], or {{0: 2, 1: 1}} with weights, got {row!r}"
    if isinstance(row, list):
        is_right = all(type(rank) is int and rank >= 0 for rank in row)
        if not is_right or len(set(row)) < len(row):
            raise ValueError(message)
        return row
    if not isinstance(row, dict):
        raise ValueError(message)
    for rank, weight in row.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not re.fullmatch(r"0|[1-9][0-9]*", str(rank)):
            raise ValueError(message)
    weights = {int(rank): float(weight) for rank, weight in row.items()}
    if len(weights) < len(row):  # the keys "0" and 0 are one rank
        raise ValueError(message)
    return weights


PlacementSetting = Annotated[
    Union[str, dict[str, Union[list[int], dict[str, float]]]],  # noqa: UP007
    BeforeValidator(_check_placement),
]
