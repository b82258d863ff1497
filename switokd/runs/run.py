"""An existing run as a Python object: its results, networks and data.

Not covered: training (`api.py`); formats of exported networks (`export/exporter.py`).
"""

from __future__ import annotations

import json
import os
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
from switokd.config.run_folders import config_file
from switokd.data import network_input, pictures
from switokd.data.images import Images, View, open_images
from switokd.data.signature import COLOURS, InputSignature
from switokd.data.sources import ArraySource, ItemSource
from switokd.errors import UsageError
from switokd.export.manifest import FILES, Format, WeightsChoice
from switokd.export.trained import load_with_config, signature_of
from switokd.runs.curves import draw_curves
from switokd.runs.json_lines import read_lines
from switokd.runs.replay.alternatives import alternatives
from switokd.runs.replay.record import FolderRecord
from switokd.runs.replay.replay import Replay, replay

if TYPE_CHECKING:
    from switokd.export.exporter import Scaling

EMPTY: Mapping[str, Any] = MappingProxyType({})
"""Immutable default for arguments that are mappings."""


class Run:
    """One run; files are read from its folder when they are needed.

    path: the run folder. objects: networks and data sets of the run that are Python objects, by
    their names in the configuration (`plugins.py`).
    """

    def __init__(self, path: Path, objects: Mapping[str, Any] = EMPTY) -> None:
        self.path, self._objects = path, objects

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def config(self) -> Config:
        """The effective configuration. UsageError if config.yaml cannot be read."""
        return load(str(self.path / "config.yaml"))

    @property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json. UsageError if the run has not finished."""
        path = self.path / "summary.json"
        if not os.path.exists(path):
            raise UsageError(
                f"{self.path}: there is no summary.json, which is written last: the run has not "
                "finished or has failed; its metrics and decisions so far can be read"
            )
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl: one dict per epoch and network, top-1 in percent."""
        return read_lines(self.path / "metrics.jsonl")

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """Lines of decisions.jsonl: one dict per step and pair."""
        return read_lines(self.path / "decisions.jsonl")

    def curves(self) -> Path:
        """Path of curves.png with gap, threshold and accuracy; drawn now if it does not exist.

        UsageError if the run has no decisions yet.
        """
        path = self.path / "curves.png"
        if os.path.exists(path) and os.path.exists(self.path / "summary.json"):
            return path
        if not self.decisions:
            raise UsageError(f"{self.path}: the run has no decisions yet, so there is no picture")
        return draw_curves(self.path)

    def replay(
        self,
        *,
        deltas: Sequence[float] = (),
        strategies: Sequence[str] = (),
        scales: Sequence[float] = (),
    ) -> Replay:
        """Derive every decision again, as `switokd replay`, and apply other rules to the distances.

        deltas: fixed thresholds, 0 to 2. strategies: names or import strings, with arguments like
        "threshold:delta=0.5". scales: factors of the run's own threshold. UsageError if the run has
        no decisions, if a line of the record is damaged, or for a wrong argument.
        """
        record = FolderRecord(self.path)
        with self._importable():
            others = alternatives(record.deciding, deltas, strategies, scales)
            return replay(record, others)

    def network(self, name: str, weights: WeightsChoice = "last") -> nn.Module:
        """Load a network with trained weights, on the CPU, in evaluation mode.

        weights: last, best, ema or initial, if the run kept them. UsageError if the network or its
        weights do not exist, or if the network is a Python object that `load_run` did not get.
        """
        with self._importable():
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
        """Export a network like `switokd export`; returns the artefact's folder.

        network: name of the network, by default the run's only student. weights: as for `network`.
        out: the artefact's folder, by default RUN/export/NETWORK. scaling: mean and standard
        deviation with which a data set of floats normalises values in [0, 1]. UsageError for wrong
        arguments, SwitokdError if an exported file computes other logits than the network.
        """
        # Imported here, because the exporters' import takes long.
        from switokd.export.exporter import export

        with self._importable():
            return export(self.path, network, formats, weights, out, scaling=scaling)

    @cached_property
    def signature(self) -> InputSignature:
        """Input format of the networks and names of the classes.

        Read from signature.json, or from the data set if that file does not exist.
        """
        with self._importable():
            return signature_of(self.path, self.config)

    @cached_property
    def images(self) -> Images:
        """The run's data; `images.test()` yields the batches that the networks are evaluated on.

        UsageError if the data set is missing, or is a Python object that `load_run` did not get.
        """
        with self._importable():
            return open_images(self.config.data, self.config.seed)

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of the logits; numbers if the data set has no names."""
        return list(self.signature.labels)

    def prepare(self, image: Image.Image) -> Tensor:
        """Prepare an image like the images of the test set: `[1, C, H, W]`, float32, normalised.

        Scales and crops like `switokd predict` (`data/network_input.py`). If the data set makes
        floats itself, the transform of the test set prepares the image, and the data set is needed.
        UsageError if the result has another shape or type than the run's images.
        """
        signature = self.signature
        if signature.mean and signature.channels in COLOURS:
            pixels = torch.from_numpy(network_input.prepare(image, signature))
            mean, std = (torch.tensor(v)[:, None, None] for v in (signature.mean, signature.std))
            return ((pixels - mean) / std)[None]
        sources = self.images.sources
        x = self._transformed(image)
        reference = sources.test.fetch([0], np.zeros(1, np.uint64))[0]
        if x.shape != reference.shape[1:]:
            raise UsageError(
                f"the image is {list(x.shape)} (channels, height, width), the run's images are "
                f"{list(self.images.shape)}; resize the image first"
            )
        if x.dtype.is_floating_point != reference.dtype.is_floating_point:
            raise UsageError(
                f"the image is {x.dtype}, and the run's data set makes images of "
                f"{reference.dtype} itself; let the data set make this image as well"
            )
        source = ArraySource(x[None], torch.zeros(1, dtype=torch.long))
        return View(source, sources, self.config.seed).batch([(0, 0)])[0]

    def _transformed(self, image: Image.Image) -> Tensor:
        """The image `[C, H, W]` after the transform of the test set, if there is one."""
        image = pictures.plain(image, self.images.shape[0])
        test = self.images.sources.test
        transform = getattr(test.items, "transform", None) if isinstance(test, ItemSource) else None
        x = transform(image) if transform is not None else image
        return x if isinstance(x, Tensor) else _bytes(x)

    @contextmanager
    def _importable(self) -> Iterator[None]:
        """Make the run's Python objects and modules available."""
        folders = import_folders(self.config, self.path.resolve())
        with plugins.lend(self._objects), importing_from(folders):
            yield


def load_run(
    path: str | Path,
    *,
    networks: Mapping[str, Any] = EMPTY,
    train: Any = None,
    test: Any = None,
    classes: int | None = None,
) -> Run:
    """Open an existing run folder. UsageError if the folder is not a run folder.

    networks, train, test, classes: the objects that `switokd.distil` got; only needed to load a
    network of such a run. The user's own modules are imported from the folders that the run's
    configuration names, and from the current folder.
    """
    run = Run(Path(path))
    config_file(run.path)
    objects: dict[str, Any] = {}
    for name, network in networks.items():
        if name not in run.config.networks:
            known = ", ".join(run.config.networks)
            raise UsageError(f"networks: {path} has no network {name!r} (known: {known})")
        objects[run.config.networks[name].model] = network
    if train is not None and test is not None:
        objects[run.config.data.dataset] = plugins.Datasets(train, test, classes)
    return Run(run.path, objects)


@contextmanager
def importing_from(folders: Iterable[str]) -> Iterator[None]:
    """Append folders to sys.path inside the body."""
    added = [f for f in folders if f not in sys.path]
    sys.path += added
    try:
        yield
    finally:
        for folder in added:
            with suppress(ValueError):
                sys.path.remove(folder)


def _bytes(image: Any) -> Tensor:
    """Convert a PIL image or an array `[H, W(, C)]` to a tensor `[C, H, W]`."""
    array = np.array(image)
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).permute(2, 0, 1)
