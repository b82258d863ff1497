"""An artefact: one trained network in a folder of its own, with all that is needed to use it.

    artefact.json    this manifest: network, labels, normalisation, what was checked
    weights.pt       the network's state dict, for plain `torch.load`
    model.onnx       an ONNX program
    model.pt2        a `torch.export` program

    artefact = load_artefact("runs/digits-2t1s-001/export/student")
    artefact.predict(["three.png"])          # [[Guess(label="3", index=3, probability=0.98), ...]]
    artefact.logits(images)                  # [B, C, H, W] in [0, 1] to [B, classes]

Both programs take float32 images in [0, 1] and normalise them themselves; weights.pt is the bare
network, and whoever loads it by hand normalises with the manifest's mean and std. Using model.onnx
needs onnxruntime and no torch.

Not covered: making one (`export.py`); reading picture files (`pictures.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from switokd import pictures
from switokd.errors import UsageError, nearest
from switokd.interface import COLOURS, Interface
from switokd.pictures import Floats

Format = Literal["onnx", "torch-export", "state-dict"]
FILES: Mapping[Format, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "state-dict": "weights.pt",
}
"""File by format, the one that is used first where a user does not say."""

Run = Callable[[Floats], Floats]
"""Images `[B, C, H, W]` in float32, values as `Interface.takes` says, to logits `[B, classes]`."""

Picture = str | Path | Image | NDArray[Any]
"""A file, a Pillow image, or an array (a tensor, too) `[C, H, W]` as `Interface.takes` says."""

Weights = Literal["last", "best", "ema", "initial"]
"""At the run's end; at the epoch with the best top-1; the moving average; before the first step."""

BATCH = 64
MANIFEST = "artefact.json"
T = TypeVar("T")


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
    weights: Weights
    top1: float | None
    """On the run's test set, in percent."""
    interface: Interface
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


@dataclass(frozen=True)
class Guess:
    """One class that a picture may be of."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Artefact:
    """A network ready for use. Made by `load_artefact`."""

    folder: Path
    manifest: Manifest
    format: Format
    run: Run

    def logits(self, images: Floats) -> Floats:
        """Logits `[B, classes]` of images `[B, C, H, W]`, values in [0, 1], any B above 0.

        UsageError if the shape is another.
        """
        images = np.ascontiguousarray(images, dtype=np.float32)
        if images.ndim != 4 or images.shape[1:] != self.manifest.interface.shape:
            expected = " x ".join(str(n) for n in self.manifest.interface.shape)
            raise UsageError(
                f"images of shape {list(images.shape)}: this network takes [batch, channels, "
                f"height, width] of {expected}"
            )
        return np.concatenate(
            [self.run(b) for b in np.split(images, range(BATCH, len(images), BATCH))]
        )

    def predict(self, images: Sequence[Picture], top: int = 5) -> list[list[Guess]]:
        """Of each image the `top` likeliest classes, the likeliest first.

        Files and Pillow images may be of any size and colour. UsageError if one cannot be read
        or does not fit.
        """
        guesses: list[list[Guess]] = []
        for batch in batched(images, BATCH):
            z = self.logits(np.stack([self.prepare(image) for image in batch]))
            guesses += [self._guesses(row, top) for row in z]
        return guesses

    def prepare(self, image: Picture) -> Floats:
        """One image as `[C, H, W]`, as `logits` takes it."""
        if isinstance(image, str | Path):
            self.check_takes_pictures()
            return pictures.read(Path(image), self.manifest.interface)
        if isinstance(image, Image):
            self.check_takes_pictures()
            return pictures.prepare(image, self.manifest.interface)
        array = np.asarray(image)
        if array.dtype.kind != "f" or array.shape != self.manifest.interface.shape:
            raise UsageError(
                f"an array must hold floats of shape {list(self.manifest.interface.shape)}, got "
                f"{array.dtype} of {list(array.shape)}; for bytes, divide by 255"
            )
        return array.astype(np.float32)

    def check_takes_pictures(self) -> None:
        """UsageError if it takes arrays alone: other channels, or a scaling that is unknown."""
        interface = self.manifest.interface
        if interface.channels not in COLOURS:
            raise UsageError(
                f"{self.folder}: this network takes {interface.channels} channels, and a picture "
                "has 1 or 3; give arrays to Artefact.predict in Python"
            )
        if not interface.mean:
            raise UsageError(
                f"{self.folder}: its data set returned floats, and how it scales pictures is not "
                "known; export again with --mean and --std, by which it normalises values in "
                "[0, 1] (--mean 0 --std 1 if it does not)"
            )

    def _guesses(self, z: Floats, top: int) -> list[Guess]:
        exp = np.exp((z - z.max()).astype(np.float64))
        p, labels = exp / exp.sum(), self.manifest.interface.labels
        best = np.argsort(-p, kind="stable")[:top]
        return [Guess(labels[i], int(i), float(p[i])) for i in best]


def load_artefact(folder: str | Path, format: Format | None = None) -> Artefact:
    """Open an artefact: in `format`, or the first of onnx, torch-export, state-dict that works.

    UsageError if it is none, has no such format, or a file is not the one that was checked.
    """
    from switokd import formats

    folder = Path(folder)
    manifest = Manifest.load(folder)
    if format is not None and format not in manifest.files:
        raise UsageError(
            f"{folder} has no {format}{nearest(str(format), manifest.files)}; it has "
            f"{', '.join(manifest.files)}"
        )
    can = [f for f in FILES if f in manifest.files and not formats.missing(f)]
    chosen = format or (can or list(manifest.files))[0]
    path = folder / manifest.files[chosen].file
    if not path.is_file():
        raise UsageError(f"{path} is missing; copy the whole folder, or export again")
    if sha256(path) != manifest.files[chosen].sha256:
        raise UsageError(
            f"{path} is not the file that was checked: its SHA-256 differs from {MANIFEST}; "
            "export again"
        )
    return Artefact(folder, manifest, chosen, formats.open_program(chosen, path, manifest))


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def batched(items: Sequence[T] | Iterator[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
