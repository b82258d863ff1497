"""The setting `placement`: a name or a table of networks and ranks."""

from __future__ import annotations

import re
from typing import Annotated, Any, Union

from pydantic import (
    BeforeValidator,
)

from switokd.runtime.placement import Placement


def _check_placement(value: Any) -> Any:
    """Refuse what is no placement with one sentence, where a union's types would give several."""
    if isinstance(value, dict):
        try:
            Placement.of({name: ranks_of_row(row) for name, row in value.items()})
        except ValueError as error:
            raise ValueError(f"a table {{NETWORK: [RANK, ...]}}: {error}") from None
    elif value not in ("dedicated", "replicated", "auto"):
        raise ValueError("dedicated, replicated, auto, or a table {NETWORK: [RANK, ...]}")
    return value


def ranks_of_row(row: Any) -> list[int] | dict[int, float]:
    """One network's ranks: a list, or {rank: weight}, whose keys JSON has made text."""
    words = f"a network's ranks are [0, 1], or {{0: 2, 1: 1}} with weights, got {row!r}"
    if isinstance(row, list):
        is_right = all(type(rank) is int and rank >= 0 for rank in row)
        if not is_right or len(set(row)) < len(row):
            raise ValueError(words)
        return row
    if not isinstance(row, dict):
        raise ValueError(words)
    for rank, weight in row.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not re.fullmatch(r"0|[1-9][0-9]*", str(rank)):
            raise ValueError(words)
    weights = {int(rank): float(weight) for rank, weight in row.items()}
    if len(weights) < len(row):  # "0" and 0
        raise ValueError(words)
    return weights


PlacementSetting = Annotated[
    Union[str, dict[str, Union[list[int], dict[str, float]]]],  # noqa: UP007
    BeforeValidator(_check_placement),
]
