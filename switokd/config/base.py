"""The base class of all sections of a run file, and their types of numbers and text.

Not covered: the sections themselves (`sections.py`, `optimizers.py`, `config.py`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A share from 0 to below 1."""
Temperature = Annotated[float, Field(ge=0.001, le=1e6)]
"""Divides logits; one that is much smaller, or much larger, would overflow."""
Seconds = Annotated[float, Field(gt=0, le=1e7)]
"""A time to wait; the system's clocks end at some 100 years."""
MOST_RANKS = 65_536
KeyText = Annotated[str, Field(min_length=1)]
"""Text that is not empty."""


class Section(BaseModel):
    """Base of all sections of a run file.

    Frozen and strict: no conversion of types, no unknown keys, no NaN or infinity. The docstring
    below a setting is its documentation for users.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
