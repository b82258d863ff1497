"""The manifest of an artefact: the network, its input, and the files with their checksums.

Torch-free.

Not covered: writing the files (`exporter.py`, `formats.py`); using an artefact (`artefact.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from switokd.data.signature import InputSignature
from switokd.errors import UsageError

Format = Literal["onnx", "torch-export", "state-dict"]

FILES: Mapping[Format, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "state-dict": "weights.pt",
}
"""File name by format. If the user names no format, the first available one is used."""

WeightsChoice = Literal["last", "best", "ema", "initial"]
"""Weights at the end of the run, of the epoch with the best top-1, of the moving average at the
end, or before the first step."""

MANIFEST = "artefact.json"


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )


class CheckedFile(_Part):
    """One file of the artefact, and the comparison of its logits with the trained network's."""

    file: str
    sha256: str
    takes: str
    """Description of the input."""
    max_difference: float
    """Largest absolute difference of a logit."""
    tolerance: float
    """Largest difference that is allowed."""
    same_class: float
    """Share of the images with the same predicted class, 0 to 1."""


class Manifest(_Part):
    """The content of artefact.json."""

    version: Literal[1] = 1
    network: str
    role: str
    model: str
    model_kwargs: dict[str, Any]
    output: str | int | None = None
    """Where the logits are in what the model returns; only weights.pt needs it."""
    import_from: tuple[str, ...]
    """Folders with the user's own modules; only weights.pt needs them."""
    parameters: int
    run: str
    strategy: str
    weights: WeightsChoice
    top1: float | None
    """Top-1 accuracy on the test set of the run, in percent."""
    signature: InputSignature
    checked_on: str
    """Description of the images on which the files were compared."""
    files: dict[Format, CheckedFile]
    versions: dict[str, str]
    """Versions of the packages that wrote the files."""

    def save(self, folder: Path) -> None:
        """Write artefact.json into `folder`."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read artefact.json in `folder`; UsageError if it is missing or not valid."""
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
            where = f"{key}: " if key else ""
            raise UsageError(
                f"{folder / MANIFEST} is damaged: {where}{problem['msg']}; export the network again"
            ) from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
