"""The input signature of a run's networks: image shape, normalisation, and names of the classes.

Rank 0 writes it into the run folder, so that a network can be exported and used without the data
set. Torch-free.

Not covered: reading image files (`pictures.py`); inputs that are not one image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from switokd.errors import UsageError

if TYPE_CHECKING:
    from switokd.data.images import Images

COLOURS = {1: "greyscale", 3: "RGB"}
"""Colours of an image file's array, by number of channels."""


class InputSignature(BaseModel):
    """Shape and normalisation of a network's input, and the classes of its logits."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    """In pixels."""
    width: int = Field(ge=1)
    """In pixels."""
    values: Literal["bytes", "floats"]
    """bytes: pixels of 0 to 255, which switokd scales; floats: the data set scales them itself."""
    mean: tuple[float, ...] = ()
    """By channel, subtracted from values in [0, 1]; empty if the data set's scaling is unknown."""
    std: tuple[float, ...] = ()
    """By channel, divides the difference; empty if the data set's scaling is unknown."""
    resize: tuple[int, int]
    """Height and width in pixels that an image is scaled to cover before its centre is cropped."""
    labels: tuple[str, ...] = Field(min_length=1)
    """Names of the classes, in the order of the logits."""

    @model_validator(mode="after")
    def _check_scaling(self) -> InputSignature:
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, self.channels):
            raise ValueError(f"mean and std need {self.channels} numbers each, or none")
        if not all(value > 0 for value in self.std):
            raise ValueError("std needs numbers above 0")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.height, self.width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.labels)

    @property
    def takes(self) -> str:
        """Describe the input of an exported program."""
        shape = f"float32 images [batch, {self.channels}, {self.height}, {self.width}]"
        if not self.mean:
            return f"{shape} as the run's data set gives them"
        colour = COLOURS.get(self.channels, "channels as in the run's data set")
        return f"{shape}, {colour}, values 0 to 1 (bytes / 255); it normalises them itself"

    def with_scaling(self, mean: tuple[float, ...], std: tuple[float, ...]) -> InputSignature:
        """Return a copy with the scaling of a data set of floats; one number is for all channels.

        UsageError if the run's scaling is known already, or the numbers are invalid.
        """
        if self.values == "bytes":
            raise UsageError(
                f"--mean, --std: this run's normalisation is known (mean {list(self.mean)}, std "
                f"{list(self.std)}); they are for data sets that return floats"
            )
        mean, std = (v * self.channels if len(v) == 1 else v for v in (mean, std))
        try:
            return InputSignature.model_validate({**self.model_dump(), "mean": mean, "std": std})
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UsageError(f"--mean, --std: found {list(mean)}, {list(std)}; {message}") from None

    def save(self, path: Path) -> None:
        """Write the signature as JSON."""
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> InputSignature:
        """Read a file written by `save`; UsageError for any other file."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not a file that a run has written"
            raise UsageError(f"{path} cannot be read: {reason}") from None

    @classmethod
    def of(cls, images: Images) -> InputSignature:
        """Make the signature of an open data set."""
        sources, (channels, height, width) = images.sources, images.shape
        first = sources.test.fetch([0], np.zeros(1, dtype=np.uint64))[0]
        is_bytes = not first.is_floating_point()
        side = sources.resize
        return cls(
            channels=channels,
            height=height,
            width=width,
            values="bytes" if is_bytes else "floats",
            mean=_per_channel(sources.mean, channels) if is_bytes else (),
            std=_per_channel(sources.std, channels) if is_bytes else (),
            resize=(height, width) if side is None else (side, side),
            labels=sources.names or tuple(str(label) for label in range(sources.classes)),
        )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one value per channel; a single value is for all."""
    return values * channels if len(values) == 1 else values
