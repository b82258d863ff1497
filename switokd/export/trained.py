"""Loads a trained network from a run folder: builds the network and loads its weights.

Not covered: exporting the network (`exporter.py`); starting a run from trained weights
(`networks.NAME.weights`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from switokd.config.config import Config
from switokd.config.run_file import load_importable
from switokd.config.run_folders import config_file
from switokd.data.augment import seeding
from switokd.data.images import open_images
from switokd.data.signature import InputSignature
from switokd.errors import UsageError, nearest
from switokd.export.manifest import WeightsChoice
from switokd.models import registry
from switokd.models.given_weights import load_weights
from switokd.runtime.durable import check_sum

WEIGHTS_FILES: Mapping[WeightsChoice, str] = {
    "last": "weights/{}.pt",
    "best": "weights/best/{}.pt",
    "ema": "weights/{}.ema.pt",
    "initial": "weights/initial/{}.pt",
}
"""File of a network's weights in the run folder (`runs/run_folder.py`)."""

REASONS_MISSING: Mapping[WeightsChoice, str] = {
    "last": "the run has not ended, or failed",
    "best": "no epoch has been tested, or version 0.1.0 made the run, which saved only last",
    "ema": "the run had no moving average (schedule.ema_decay)",
    "initial": "the run did not save them (save_initial_weights)",
}
"""Why a file of weights may be missing."""


@dataclass(frozen=True)
class TrainedNetwork:
    """One network of a run, on the CPU, in evaluation mode."""

    run_folder: Path
    config: Config
    name: str
    network: torch.nn.Module
    signature: InputSignature
    weights: WeightsChoice
    """Which weights the network has."""
    top1: float | None
    """Top-1 accuracy of these weights on the test set of the run, in percent."""


def load_trained(
    run: Path,
    name: str | None = None,
    weights: WeightsChoice = "last",
    settings: Sequence[str] = (),
) -> TrainedNetwork:
    """Load a network from the run folder `run`.

    name: name of the network; None: the student, if the run has only one.
    settings: KEY.KEY=VALUE that replace settings of the run, such as data.root for moved data.
    Raises UsageError if the folder is no run folder, or lacks the network or the weights.
    """
    path = str(config_file(run))
    return load_with_config(run, load_importable(path, settings), name, weights)


def load_with_config(run: Path, config: Config, name: str | None, weights: str) -> TrainedNetwork:
    """Load a network as `load_trained` does, with the configuration of the run.

    The folders in `import_from` must be importable.
    """
    name = _network_name(config, run, name)
    file, choice = _weights_file(run, name, weights)
    signature = signature_of(run, config)
    model = config.networks[name]
    network = build(model.model, model.model_kwargs, signature, model.output)
    check_sum(file)
    load_weights(network, file, f"{run.name}, network {name}")
    network.eval()
    top1 = _top1(run, name, choice)
    return TrainedNetwork(run, config, name, network, signature, choice, top1)


def build(
    name: str,
    kwargs: Mapping[str, Any],
    signature: InputSignature,
    output: str | int | None = None,
) -> torch.nn.Module:
    """Build a network as training does; the state of random number generators is unchanged.

    output: as in `registry.build`.
    """
    channels, classes = signature.channels, signature.classes
    side = min(signature.height, signature.width)
    with seeding():
        return registry.build(name, channels, classes, kwargs, side, output)


def _network_name(config: Config, run: Path, name: str | None) -> str:
    """Return the name, or that of the only student; UsageError if there is no such network."""
    students = config.topology.students
    if name is None and len(students) > 1:
        raise UsageError(
            f"{run} has {len(students)} students; choose a network with --network, in "
            f"Python with network= ({', '.join(config.networks)})"
        )
    if name is None:
        return students[0]
    if name not in config.networks:
        raise UsageError(
            f"{run} has no network {name!r}{nearest(name, config.networks)} (networks: "
            f"{', '.join(config.networks)})"
        )
    return name


def _weights_file(run: Path, name: str, weights: str) -> tuple[Path, WeightsChoice]:
    """Return the file of the weights, and which weights these are; UsageError if it is missing."""
    choice: WeightsChoice | None = next((c for c in WEIGHTS_FILES if c == weights), None)
    if choice is None:
        raise UsageError(f"weights: found {weights!r}; allowed: {', '.join(WEIGHTS_FILES)}")
    file = WEIGHTS_FILES[choice].format(name)
    if not os.path.isfile(run / file):
        raise UsageError(f"{run} has no {file}: {REASONS_MISSING[choice]}")
    return run / file, choice


def signature_of(run: Path, config: Config) -> InputSignature:
    """Read the signature that the run saved; for a run of version 0.1.0 open its data set."""
    path = run / "signature.json"
    return (
        InputSignature.load(path)
        if os.path.isfile(path)
        else InputSignature.of(open_images(config.data, 0))
    )


def _top1(run: Path, name: str, weights: WeightsChoice) -> float | None:
    """Read the top-1 accuracy in percent from the summary of the run; None if there is none."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        key = "top1_ema_last" if weights == "ema" else f"top1_{weights}"
        return float(summary["networks"][name][key])
    except (OSError, ValueError, KeyError, TypeError):
        return None
