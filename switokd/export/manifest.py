"""The manifest of an artefact: its files, their checksums, and what the network takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from switokd.data.pictures import Floats
from switokd.data.signature import InputSignature
from switokd.errors import UsageError

Format = Literal["onnx", "torch-export", "state-dict"]


FILES: Mapping[Format, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "state-dict": "weights.pt",
}
"""File by format, the one that is used first where a user does not say."""


Program = Callable[[Floats], Floats]
"""float32 images `[B, C, H, W]` as `InputSignature.takes` says, to logits `[B, classes]`."""


WeightsChoice = Literal["last", "best", "ema", "initial"]
"""At the run's end; at the epoch with the best top-1; the moving average; before the first step."""


MANIFEST = "artefact.json"


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )


class CheckedFile(_Part):
    """One file, and how its outputs compare with the trained network's."""

    file: str
    sha256: str
    takes: str
    max_difference: float
    """Largest difference of a logit."""
    tolerance: float
    """What it may be."""
    same_class: float
    """Share of the images whose predicted class is the same, 0 to 1."""


class Manifest(_Part):
    """What artefact.json holds."""

    version: Literal[1] = 1
    network: str
    role: str
    model: str
    model_kwargs: dict[str, Any]
    import_from: tuple[str, ...]
    """Where the run found modules of the user's own; only weights.pt needs them."""
    parameters: int
    run: str
    strategy: str
    weights: WeightsChoice
    top1: float | None
    """On the run's test set, in percent."""
    signature: InputSignature
    checked_on: str
    """Which images, in words."""
    files: dict[Format, CheckedFile]
    versions: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write it into `folder`."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read it from `folder`; UsageError if there is none."""
        try:
            return cls.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"{folder} is no artefact: {MANIFEST} cannot be read ({error.strerror}); make one "
                "with 'switokd export RUN_FOLDER'"
            ) from None
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in problem["loc"])
            raise UsageError(f"{folder / MANIFEST}: {key}: {problem['msg']}") from None


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
