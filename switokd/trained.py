"""A network out of a run folder: built anew, with its weights, and what belongs to it.

Not covered: exporting it (`export.py`); training on from its weights (`networks.NAME.weights`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from switokd import models
from switokd.config import Config
from switokd.data import open_images
from switokd.errors import UsageError, nearest
from switokd.interface import Interface
from switokd.runfile import load_importable

Weights = Literal["last", "best"]


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
    file = run / "weights" / f"{name}.pt"
    best = run / "weights" / "best" / f"{name}.pt"
    if weights == "best" and best.is_file():
        file = best
    else:
        weights = "last"
    if not file.is_file():
        raise UsageError(f"{run} has no weights/{name}.pt: the run has not ended, or failed")
    interface = _interface(run, config)
    model = config.networks[name]
    with torch.random.fork_rng(devices=[]):  # its first weights are not used
        network = models.build(
            model.model, interface.channels, len(interface.labels), model.model_kwargs
        )
    models.load_weights(network, file, f"{run.name}, network {name}")
    network.eval()
    top1 = _top1(run, name, weights)
    return Trained(run, config, name, network, interface, weights, top1)


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


def _interface(run: Path, config: Config) -> Interface:
    """What the run wrote down; for a run of version 0.1.0, what its data set says."""
    path = run / "interface.json"
    return Interface.load(path) if path.is_file() else Interface.of(open_images(config.data, 0))


def _top1(run: Path, name: str, weights: Weights) -> float | None:
    """From the run's summary, if it has one."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        return float(summary["networks"][name][f"top1_{weights}"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
