"""What all sections of a run file share: the base class and the types of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)

Positive = Annotated[float, Field(gt=0)]


NonNegative = Annotated[float, Field(ge=0)]


Fraction = Annotated[float, Field(ge=0, lt=1)]


Temperature = Annotated[float, Field(ge=0.001)]


KeyText = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, no unknown keys, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
