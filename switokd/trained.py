"""A network out of a run folder: built anew, with its weights, and what belongs to it.

Not covered: exporting it (`export.py`); training on from its weights (`networks.NAME.weights`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from switokd import models
from switokd.config import Config
from switokd.data import open_images
from switokd.errors import UsageError, nearest
from switokd.interface import Interface
from switokd.runfile import load_importable

Weights = Literal["last", "best", "ema"]
"""At the run's end; at the epoch with the best top-1; the moving average, if there is one."""


@dataclass(frozen=True)
class Trained:
    """One network of a finished run, on the CPU, in evaluation mode."""

    run: Path
    config: Config
    name: str
    network: torch.nn.Module
    interface: Interface
    weights: Weights
    """Which it has: the last, where the run kept no best ones."""
    top1: float | None
    """On the run's test set, in percent, with these weights."""


def load_trained(
    run: Path, name: str | None = None, weights: Weights = "last", settings: Sequence[str] = ()
) -> Trained:
    """Load a network of the run in folder `run`; by default its only student.

    settings: key.key=value on top of the run's own, such as data.root, for data that has moved.
    UsageError if the folder holds no finished run, or no such network.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{run} is no run folder: there is no config.yaml in it")
    config = load_importable(str(path), settings)
    name = _network(config, run, name)
    file, weights = _file(run, name, weights)
    interface = _interface(run, config)
    model = config.networks[name]
    network = build(model.model, model.model_kwargs, interface)
    models.load_weights(network, file, f"{run.name}, network {name}")
    network.eval()
    top1 = _top1(run, name, weights)
    return Trained(run, config, name, network, interface, weights, top1)


def build(name: str, kwargs: Mapping[str, Any], interface: Interface) -> torch.nn.Module:
    """Make the network as training did; its first weights are nobody's, and cost no randomness."""
    sides = interface.height, interface.width
    with torch.random.fork_rng(devices=[]):
        return models.build(name, interface.channels, interface.classes, kwargs, min(sides))


def _network(config: Config, run: Path, name: str | None) -> str:
    """The network that is meant."""
    students = config.topology.students
    if name is None and len(students) > 1:
        raise UsageError(
            f"{run} has {len(students)} students; choose a network with --network "
            f"({', '.join(config.networks)})"
        )
    if name is None:
        return students[0]
    if name not in config.networks:
        raise UsageError(
            f"{run} has no network {name!r}{nearest(name, config.networks)} (networks: "
            f"{', '.join(config.networks)})"
        )
    return name


def _file(run: Path, name: str, weights: Weights) -> tuple[Path, Weights]:
    """The state dict that is meant, and which one that is."""
    folder = run / "weights"
    last, best, ema = (
        folder / f"{name}.pt",
        folder / "best" / f"{name}.pt",
        folder / f"{name}.ema.pt",
    )
    if not last.is_file():
        raise UsageError(f"{run} has no weights/{name}.pt: the run has not ended, or failed")
    if weights == "ema" and not ema.is_file():
        raise UsageError(f"{run} has no weights/{name}.ema.pt: it kept no moving average")
    if weights == "ema":
        return ema, "ema"
    return (best, "best") if weights == "best" and best.is_file() else (last, "last")


def _interface(run: Path, config: Config) -> Interface:
    """What the run wrote down; for a run of version 0.1.0, what its data set says."""
    path = run / "interface.json"
    return Interface.load(path) if path.is_file() else Interface.of(open_images(config.data, 0))


def _top1(run: Path, name: str, weights: Weights) -> float | None:
    """From the run's summary, if it has one."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        key = "top1_ema_last" if weights == "ema" else f"top1_{weights}"
        return float(summary["networks"][name][key])
    except (OSError, ValueError, KeyError, TypeError):
        return None
