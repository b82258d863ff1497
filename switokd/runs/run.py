"""A run that is there, as Python sees it: its record, its networks, its data.

Not covered: training (`api.py`); the forms of exported networks (`exporter.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from switokd import plugins
from switokd.config.config import Config
from switokd.config.run_file import import_folders, load
from switokd.data import pictures
from switokd.data.images import Images, View, open_images
from switokd.data.signature import COLOURS, InputSignature
from switokd.data.sources import ArraySource, ItemSource
from switokd.errors import UsageError
from switokd.export.manifest import FILES, Format, WeightsChoice
from switokd.export.trained import load_with_config, signature_of
from switokd.runs.curves import draw_curves
from switokd.runs.run_folder import read_lines

if TYPE_CHECKING:
    from switokd.export.exporter import Scaling

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Run:
    """One run, read from its folder when it is asked for.

    lent: its objects, see `plugins.py`.
    """

    def __init__(self, path: Path, lend: Mapping[str, Any] = NOTHING) -> None:
        self.path, self._lent = path, lend

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def config(self) -> Config:
        """The effective configuration. UsageError if it cannot be read."""
        return load(str(self.path / "config.yaml"))

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds. UsageError if the run has not ended well."""
        path = self.path / "summary.json"
        if not path.exists():
            raise UsageError(
                f"{self.path}: there is no summary.json, which is written last: the run goes on, "
                "or has failed; its metrics and decisions so far are there"
            )
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A dict per epoch and network: the lines of metrics.jsonl, top-1 in percent."""
        return read_lines(self.path / "metrics.jsonl")

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """A dict per step and pair: the lines of decisions.jsonl."""
        return read_lines(self.path / "decisions.jsonl")

    def curves(self) -> Path:
        """The picture of gap, threshold and accuracy; drawn now unless the run's end drew it.

        UsageError if there is nothing to draw.
        """
        path = self.path / "curves.png"
        if path.exists() and (self.path / "summary.json").exists():
            return path
        if not self.decisions:
            raise UsageError(f"{self.path}: the run has no decisions yet, so there is no picture")
        return draw_curves(self.path)

    def network(self, name: str, weights: WeightsChoice = "last") -> nn.Module:
        """A network with its weights after the last step, on the CPU, in evaluation mode.

        weights: last, best, ema or initial, if the run kept those. UsageError if there is no such
        network or no such weights, or if it has to be given again.
        """
        with self._at_hand():
            return load_with_config(self.path, self.config, name, weights).network

    def export(
        self,
        network: str | None = None,
        *,
        formats: Sequence[Format] = tuple(FILES),
        weights: WeightsChoice = "last",
        out: str | Path | None = None,
        scaling: Scaling | None = None,
    ) -> Path:
        """Export a network as `switokd export` does; the artefact's folder, for `load_artefact`.

        network: its name, by default the run's only student. out: by default RUN/export/NETWORK.
        scaling: mean and standard deviation by which a data set of floats normalises values in
        [0, 1]. UsageError for a mistake, SwitokdError if a file differs from the network.
        """
        from switokd.export.exporter import (
            export,  # here, because importing the exporters takes a while
        )

        with self._at_hand():
            return export(self.path, network, formats, weights, out, scaling=scaling)

    @cached_property
    def signature(self) -> InputSignature:
        """What its networks take, and the classes' names; from the data where nothing was kept."""
        with self._at_hand():
            return signature_of(self.path, self.config)

    @cached_property
    def images(self) -> Images:
        """The run's data: `images.test()` gives batches as the networks are evaluated on.

        UsageError if the data set is no longer where it was, or has to be given again.
        """
        with self._at_hand():
            return open_images(self.config.data, self.config.seed)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of a network's logits; numbers where it has none."""
        return list(self.signature.labels)

    def prepare(self, image: Image.Image) -> Tensor:
        """An image as the networks are evaluated on: `[1, C, H, W]`, float32, normalised.

        Scaled and cropped as `switokd predict` does it (`pictures.py`). Where the data set makes
        floats by itself, the image goes through the test set's transform: then the data is needed,
        and UsageError if it does not come out in the shape and type of the run's images.
        """
        known = self.signature
        if known.mean and known.channels in COLOURS:
            pixels = torch.from_numpy(pictures.prepare(image, known))
            mean, std = (torch.tensor(v)[:, None, None] for v in (known.mean, known.std))
            return ((pixels - mean) / std)[None]
        sources, shape = self.images.sources, self.images.shape
        image = image.convert("L" if shape[0] == 1 else "RGB")
        items = sources.test.items if isinstance(sources.test, ItemSource) else None
        transform = getattr(items, "transform", None)
        x = transform(image) if transform is not None else _bytes(image)
        if not isinstance(x, Tensor):
            x = _bytes(x)
        theirs = sources.test.fetch([0], np.zeros(1, np.uint64))[0]
        if x.shape != theirs.shape[1:]:
            raise UsageError(
                f"the image is {list(x.shape)} (channels, height, width), the run's images are "
                f"{list(shape)}; resize it first"
            )
        if x.dtype.is_floating_point != theirs.dtype.is_floating_point:
            raise UsageError(
                f"the image is {x.dtype}, the run's data set makes images of {theirs.dtype} in a "
                "way of its own; have it make this one, too"
            )
        one = ArraySource(x[None], torch.zeros(1, dtype=torch.long))
        return View(one, sources, self.config.seed).batch([(0, 0)])[0]

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        folders = import_folders(self.config, self.path.resolve())
        with plugins.lend(self._lent), importing_from(folders):
            yield


def load_run(
    path: str | Path,
    *,
    networks: Mapping[str, Any] = NOTHING,
    train: Any = None,
    test: Any = None,
    classes: int | None = None,
) -> Run:
    """A run that is there, by its folder. UsageError if that is none.

    networks, train, test, classes: the objects given to `switokd.distil`, if it was made by that
    and one of its networks is wanted. Modules of a run's own are imported from the folders
    that its configuration names, and the current one.
    """
    run = Run(Path(path))
    if not (run.path / "config.yaml").is_file():
        raise UsageError(f"{path} is no run folder: there is no config.yaml in it")
    lend: dict[str, Any] = {}
    for name, thing in networks.items():
        if name not in run.config.networks:
            there = ", ".join(run.config.networks)
            raise UsageError(f"networks: {path} has no network {name!r} (there are {there})")
        lend[run.config.networks[name].model] = thing
    if train is not None and test is not None:
        lend[run.config.data.dataset] = plugins.Datasets(train, test, classes)
    return Run(run.path, lend)


@contextmanager
def importing_from(folders: Iterable[str]) -> Iterator[None]:
    """Within the body modules are found in these folders too, behind all others."""
    added = [f for f in folders if f not in sys.path]
    sys.path += added
    try:
        yield
    finally:
        for folder in added:
            with suppress(ValueError):
                sys.path.remove(folder)


def _bytes(image: Any) -> Tensor:
    """`[C, H, W]` of a PIL image or an array `[H, W(, C)]`."""
    array = np.array(image)
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).permute(2, 0, 1)
