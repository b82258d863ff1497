"""The files of a comparison: table.md, compare.csv and compare.png.

Not covered: the run folders of the trials (`runs/run_folder.py`).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from switokd.errors import UsageError
from switokd.runs.compare.plot import draw
from switokd.runs.compare.statistics import Comparison
from switokd.runs.compare.table import markdown

COLUMNS = (
    "strategy",
    "seed",
    "network",
    "role",
    "top1_last",
    "top1_best",
    "steps",
    "steps_paused",
    "wall_seconds",
    "parameters",
    "saved_device_seconds",
    "teachers_device_seconds",
)
"""Columns of compare.csv. The columns in seconds belong to the whole run, not to the network."""


def csv_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row per finished run and network, with the keys of `COLUMNS`."""
    return [
        {
            "strategy": result.strategy,
            "seed": result.seed,
            "network": name,
            **{key: network[key] for key in COLUMNS if key in network},
            "wall_seconds": result.summary["wall_seconds"],
            "saved_device_seconds": result.saved_device_seconds,
            "teachers_device_seconds": result.teachers_device_seconds,
        }
        for result in comparison.finished()
        for name, network in result.networks.items()
    ]


def save(comparison: Comparison, out: Path, notes: Iterable[str] = ()) -> list[Path]:
    """Write the files to the folder `out` and return their paths: table, CSV, picture.

    UsageError if a file cannot be written.
    """
    paths = [out / "table.md", out / "compare.csv", out / "compare.png"]
    try:
        paths[0].write_text(markdown(comparison, notes), encoding="utf-8")
        with paths[1].open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(csv_rows(comparison))
        draw(comparison, paths[2])
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written: {error.strerror}") from None
    return paths
