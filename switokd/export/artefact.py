"""An artefact: a folder with one trained network and everything that is needed to use it.

    artefact.json    manifest: network, labels, normalisation, checksums
    weights.pt       state dict of the network, for `torch.load`
    model.onnx       ONNX program
    model.pt2        `torch.export` program

    artefact = load_artefact("runs/digits-2t1s-001/export/student")
    artefact.predict(["three.png"])          # [[Guess(label="3", index=3, probability=0.98), ...]]
    artefact.logits(images)                  # [B, C, H, W] in [0, 1] to [B, classes]

Both programs take float32 images in [0, 1] and normalise them. weights.pt is the network without
normalisation: code that loads the file must normalise with mean and std of the manifest. Using
model.onnx needs onnxruntime, and no torch.

Not covered: making an artefact (`exporter.py`); preparing pictures (`data/network_input.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from switokd.data import network_input
from switokd.data.network_input import Floats
from switokd.data.signature import COLOURS
from switokd.errors import UsageError, nearest
from switokd.export import formats
from switokd.export.formats import LogitsFunction
from switokd.export.manifest import FILES, MANIFEST, Format, Manifest, sha256

Picture = str | Path | Image | NDArray[Any]
"""A file, a Pillow image, or an array or tensor `[C, H, W]` as `InputSignature.takes` says."""

BATCH = 64
"""Images that are computed at once."""
T = TypeVar("T")


@dataclass(frozen=True)
class Guess:
    """One predicted class of a picture, with its probability (0 to 1)."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Artefact:
    """An exported network, ready for use. Made by `load_artefact`."""

    folder: Path
    manifest: Manifest
    format: Format
    compute_logits: LogitsFunction

    def logits(self, images: Floats) -> Floats:
        """Return the logits `[B, classes]` of images `[B, C, H, W]` with values in [0, 1].

        B may be any number above 0. Raises UsageError if the images have another shape.
        """
        images = np.ascontiguousarray(images, dtype=np.float32)
        if images.ndim != 4 or images.shape[1:] != self.manifest.signature.shape:
            expected = " x ".join(str(n) for n in self.manifest.signature.shape)
            raise UsageError(
                f"images of shape {list(images.shape)}: this network takes [batch, channels, "
                f"height, width] of {expected}"
            )
        return np.concatenate(
            [self.compute_logits(b) for b in np.split(images, range(BATCH, len(images), BATCH))]
        )

    def predict(self, images: Sequence[Picture], top: int = 5) -> list[list[Guess]]:
        """Return the `top` most likely classes of each image, most likely first.

        Files and Pillow images may have any size and colour. Raises UsageError if an image cannot
        be read or has a wrong shape.
        """
        guesses: list[list[Guess]] = []
        for batch in batched(images, BATCH):
            z = self.logits(np.stack([self.prepare(image) for image in batch]))
            guesses += [self._guesses(row, top) for row in z]
        return guesses

    def prepare(self, image: Picture) -> Floats:
        """Return one image as an array `[C, H, W]` for `logits`; UsageError if it cannot be."""
        if isinstance(image, str | Path):
            self.check_takes_pictures()
            return network_input.read(Path(image), self.manifest.signature)
        if isinstance(image, Image):
            self.check_takes_pictures()
            return network_input.prepare(image, self.manifest.signature)
        array = np.asarray(image)
        if array.dtype.kind != "f" or array.shape != self.manifest.signature.shape:
            raise UsageError(
                f"an array must hold floats of shape {list(self.manifest.signature.shape)}, got "
                f"{array.dtype} of shape {list(array.shape)}; divide bytes by 255"
            )
        return array.astype(np.float32)

    def check_takes_pictures(self) -> None:
        """Raise UsageError if the network takes only arrays.

        That is so if it has neither 1 nor 3 channels, or if the normalisation is unknown.
        """
        signature = self.manifest.signature
        if signature.channels not in COLOURS:
            raise UsageError(
                f"{self.folder}: this network takes {signature.channels} channels, and a picture "
                "has 1 or 3; give arrays to Artefact.predict in Python"
            )
        if not signature.mean:
            raise UsageError(
                f"{self.folder}: the data set returned floats, and its normalisation is unknown; "
                "export again with --mean and --std, by which the data set normalises values in "
                "[0, 1] (--mean 0 --std 1 if it does not)"
            )

    def _guesses(self, z: Floats, top: int) -> list[Guess]:
        """Return the `top` most likely classes for the logits `z` `[classes]` of one image."""
        exp = np.exp((z - z.max()).astype(np.float64))
        p, labels = exp / exp.sum(), self.manifest.signature.labels
        best = np.argsort(-p, kind="stable")[:top]
        return [Guess(labels[i], int(i), float(p[i])) for i in best]


def load_artefact(folder: str | Path, format: Format | None = None) -> Artefact:
    """Load an artefact from its folder.

    format: default is the first of onnx, torch-export, state-dict whose packages are installed.
    Raises UsageError if the folder is no artefact, if it lacks the format, or if the file has
    changed since the export.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if format is not None and format not in manifest.files:
        raise UsageError(
            f"{folder} has no {format}{nearest(str(format), manifest.files)}; it has "
            f"{', '.join(manifest.files)}"
        )
    usable = [f for f in FILES if f in manifest.files and not formats.missing(f)]
    chosen = format or (usable or list(manifest.files))[0]
    path = folder / manifest.files[chosen].file
    if not os.path.isfile(path):
        raise UsageError(f"{path} is missing; copy the whole folder, or export again")
    if sha256(path) != manifest.files[chosen].sha256:
        raise UsageError(
            f"{path} has changed since the export: its SHA-256 differs from {MANIFEST}; "
            "export again"
        )
    return Artefact(folder, manifest, chosen, formats.load(chosen, path, manifest))


def batched(items: Sequence[T] | Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last list may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
