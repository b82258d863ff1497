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

Not covered: making one (`exporter.py`); reading picture files (`pictures.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from switokd.data import pictures
from switokd.data.pictures import Floats
from switokd.data.signature import COLOURS
from switokd.errors import UsageError, nearest
from switokd.export.manifest import FILES, MANIFEST, Format, Manifest, Program, sha256

Picture = str | Path | Image | NDArray[Any]
"""A file, a Pillow image, or an array or tensor `[C, H, W]` as `InputSignature.takes` says."""


BATCH = 64
T = TypeVar("T")


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
    run: Program

    def logits(self, images: Floats) -> Floats:
        """Logits `[B, classes]` of images `[B, C, H, W]`, values in [0, 1], any B above 0.

        UsageError if the shape is another.
        """
        images = np.ascontiguousarray(images, dtype=np.float32)
        if images.ndim != 4 or images.shape[1:] != self.manifest.signature.shape:
            expected = " x ".join(str(n) for n in self.manifest.signature.shape)
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
            return pictures.read(Path(image), self.manifest.signature)
        if isinstance(image, Image):
            self.check_takes_pictures()
            return pictures.prepare(image, self.manifest.signature)
        array = np.asarray(image)
        if array.dtype.kind != "f" or array.shape != self.manifest.signature.shape:
            raise UsageError(
                f"an array must hold floats of shape {list(self.manifest.signature.shape)}, got "
                f"{array.dtype} of {list(array.shape)}; for bytes, divide by 255"
            )
        return array.astype(np.float32)

    def check_takes_pictures(self) -> None:
        """UsageError if it takes arrays alone: other channels, or a scaling that is unknown."""
        signature = self.manifest.signature
        if signature.channels not in COLOURS:
            raise UsageError(
                f"{self.folder}: this network takes {signature.channels} channels, and a picture "
                "has 1 or 3; give arrays to Artefact.predict in Python"
            )
        if not signature.mean:
            raise UsageError(
                f"{self.folder}: its data set returned floats, and how it scales pictures is not "
                "known; export again with --mean and --std, by which it normalises values in "
                "[0, 1] (--mean 0 --std 1 if it does not)"
            )

    def _guesses(self, z: Floats, top: int) -> list[Guess]:
        exp = np.exp((z - z.max()).astype(np.float64))
        p, labels = exp / exp.sum(), self.manifest.signature.labels
        best = np.argsort(-p, kind="stable")[:top]
        return [Guess(labels[i], int(i), float(p[i])) for i in best]


def load_artefact(folder: str | Path, format: Format | None = None) -> Artefact:
    """Open an artefact: in `format`, or the first of onnx, torch-export, state-dict that works.

    UsageError if it is none, has no such format, or a file is not the one that was checked.
    """
    from switokd.export import formats

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


def batched(items: Sequence[T] | Iterator[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
