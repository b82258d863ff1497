"""A network out of a run folder: built anew, with its weights, and what belongs to it.

Not covered: exporting it (`exporter.py`); training on from its weights (`networks.NAME.weights`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from switokd.config.config import Config
from switokd.config.run_file import load_importable
from switokd.data.images import open_images
from switokd.data.signature import InputSignature
from switokd.errors import UsageError, nearest
from switokd.export.manifest import WeightsChoice
from switokd.models import registry

PLACES: Mapping[WeightsChoice, str] = {
    "last": "weights/{}.pt",
    "best": "weights/best/{}.pt",
    "ema": "weights/{}.ema.pt",
    "initial": "weights/initial/{}.pt",
}
"""Where a network's weights lie in the run folder (`run_folder.py`)."""

MISSING: Mapping[WeightsChoice, str] = {
    "last": "the run has not ended, or failed",
    "best": "no epoch is tested yet, or version 0.1.0 made it, which kept the last ones",
    "ema": "it kept no moving average (schedule.ema_decay)",
    "initial": "it was not asked to keep them (save_initial_weights)",
}
"""Why they may not be there."""


@dataclass(frozen=True)
class Trained:
    """One network of a run, on the CPU, in evaluation mode."""

    run: Path
    config: Config
    name: str
    network: torch.nn.Module
    signature: InputSignature
    weights: WeightsChoice
    """Which it has."""
    top1: float | None
    """On the run's test set, in percent, with these weights."""


def load_trained(
    run: Path,
    name: str | None = None,
    weights: WeightsChoice = "last",
    settings: Sequence[str] = (),
) -> Trained:
    """Load a network of the run in folder `run`; by default its only student.

    settings: key.key=value on top of the run's own, such as data.root, for data that has moved.
    UsageError if the folder holds no run, no such network or no such weights.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{run} is no run folder: there is no config.yaml in it")
    return take(run, load_importable(str(path), settings), name, weights)


def take(run: Path, config: Config, name: str | None, weights: str) -> Trained:
    """`load_trained`, by a configuration that is read already; its modules can be imported."""
    name = _network(config, run, name)
    file, kind = _file(run, name, weights)
    signature = signature_of(run, config)
    model = config.networks[name]
    network = build(model.model, model.model_kwargs, signature)
    registry.load_weights(network, file, f"{run.name}, network {name}")
    network.eval()
    return Trained(run, config, name, network, signature, kind, _top1(run, name, kind))


def build(name: str, kwargs: Mapping[str, Any], signature: InputSignature) -> torch.nn.Module:
    """Make the network as training did; its first weights are nobody's, and cost no randomness."""
    sides = signature.height, signature.width
    with torch.random.fork_rng(devices=[]):
        return registry.build(name, signature.channels, signature.classes, kwargs, min(sides))


def _network(config: Config, run: Path, name: str | None) -> str:
    """The network that is meant."""
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


def _file(run: Path, name: str, weights: str) -> tuple[Path, WeightsChoice]:
    """The state dict that is meant, and which one that is."""
    kind: WeightsChoice | None = next((known for known in PLACES if known == weights), None)
    if kind is None:
        raise UsageError(f"weights: found {weights!r}; allowed: {', '.join(PLACES)}")
    file = PLACES[kind].format(name)
    if not (run / file).is_file():
        raise UsageError(f"{run} has no {file}: {MISSING[kind]}")
    return run / file, kind


def signature_of(run: Path, config: Config) -> InputSignature:
    """What the run wrote down; for a run of version 0.1.0, what its data set says."""
    path = run / "signature.json"
    return (
        InputSignature.load(path)
        if path.is_file()
        else InputSignature.of(open_images(config.data, 0))
    )


def _top1(run: Path, name: str, weights: WeightsChoice) -> float | None:
    """From the run's summary, if it has one."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        key = "top1_ema_last" if weights == "ema" else f"top1_{weights}"
        return float(summary["networks"][name][key])
    except (OSError, ValueError, KeyError, TypeError):
        return None
