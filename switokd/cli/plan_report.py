"""The output of `switokd plan`: a table of placements, or JSON.

Not covered: the predictions themselves (`planning/cost_model.py`).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from switokd.config.config import Config
from switokd.planning.cost_model import NOISE, Prediction, simplest_of_the_best
from switokd.planning.pauses import Pauses
from switokd.planning.placement_settings import placement_settings, train_arguments
from switokd.planning.profile import Profile
from switokd.runtime.environment import cores

OTHER_COLUMNS = 56
"""Characters that a row of the table needs beside the placement."""


@dataclass(frozen=True)
class PlacementReport:
    """The result of `switokd plan`."""

    config: Config
    batch: int
    """Images of a batch."""
    profile: Profile
    pauses: Pauses
    ranked: list[Prediction]
    """One prediction per placement, best first."""

    @property
    def recommended(self) -> Prediction:
        """The placement to use."""
        return simplest_of_the_best(self.ranked)

    @property
    def devices(self) -> int:
        """Number of ranks."""
        return self.ranked[0].placement.world_size


def as_json(report: PlacementReport) -> dict[str, Any]:
    """Return the report as a JSON object: times in seconds, sizes in bytes."""
    return {
        "name": report.config.name,
        "batch_size": report.batch,
        "devices": report.devices,
        "pauses": [
            {"paused": sorted(paused), "share": share} for paused, share in report.pauses.patterns
        ],
        "placements": [
            {
                "placement": str(p.placement),
                "table": {name: dict(row) for name, row in p.placement.table},
                "settings": placement_settings(p.placement, report.config),
                "processes": p.placement.world_size,
                "step_seconds": p.step_seconds,
                "images_per_second": p.images_per_second,
                "efficiency": p.efficiency,
                "memory_bytes": p.memory_bytes,
                "fits": p.fits,
            }
            for p in report.ranked
        ],
        "chosen": report.ranked.index(report.recommended),
        "profile": report.profile.model_dump(mode="json"),
    }


def print_table(report: PlacementReport, arguments: list[str], top: int) -> None:
    """Print the assumptions, the `top` best placements, and the command for the recommended one.

    arguments: run file and settings as they were given to `switokd plan`.
    """
    console = Console(highlight=False, soft_wrap=True)
    for line in _assumptions(report):
        console.print(line, markup=False)
    console.print(_table(report, top, console.width), soft_wrap=False)
    if len(report.ranked) > top:
        console.print(f"... and {len(report.ranked) - top} more (--top, --json)", markup=False)
    recommended = report.recommended
    console.print(f"simplest within {NOISE:.0%} of the best  {recommended.placement}", markup=False)
    for line in _notes(recommended, report.config):
        console.print(line, markup=False)
    command = shlex.join([*arguments, *train_arguments(recommended.placement, report.config)])
    console.print(f"to use it  switokd train {command}", markup=False)


def _assumptions(report: PlacementReport) -> list[str]:
    """Describe the device, the communication and the pauses that the predictions assume."""
    profile, devices = report.profile, report.devices
    link, sizes = profile.communication, ", ".join(str(n) for n in profile.sizes)
    threads = f"{profile.threads} thread{'s' * (profile.threads > 1)}"
    lines = [
        f"profiled on  {profile.device}, {threads}, torch {profile.torch}, shards of {sizes} "
        f"images of {' x '.join(str(n) for n in profile.image)}",
        f"between ranks  {link.description}: {1e6 * link.latency_seconds:g} us, "
        f"{link.bandwidth_bytes_per_second / 1e9:g} GB/s, decisions "
        f"{1000 * link.decision_seconds:g} ms",
        f"pauses  {report.pauses.source}",
    ]
    if profile.device == "cpu" and devices * profile.threads > cores():
        ranks = f"{devices} rank{'s' * (devices > 1)}"
        lines.append(f"note  {ranks} with {threads} each: slower on the {cores()} cores here")
    return lines


def _table(report: PlacementReport, top: int, width: int) -> Table:
    """Make the table of the `top` best placements for a terminal of `width` characters."""
    placements = [str(p.placement) for p in report.ranked[:top]]
    devices = f"{report.devices} device{'s' * (report.devices > 1)}"
    title = f"{report.config.name}: {report.config.topology.name} on {devices}"
    wraps = max(len(placement) for placement in placements) + OTHER_COLUMNS > width
    table = Table(title=title, show_lines=wraps)
    table.add_column("placement")
    for heading in ("step", "images/s", "efficiency", "memory/rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    for p, placement in zip(report.ranked, placements, strict=False):
        table.add_row(
            placement,
            _milliseconds(p.step_seconds),
            f"{p.images_per_second:,.0f}",
            f"{p.efficiency:.0%}",
            _memory(p) + ("" if p.fits else ", too much"),
        )
    return table


def _notes(recommended: Prediction, config: Config) -> list[str]:
    """Warn of effects of the recommended placement on BatchNorm and memory."""
    notes = []
    if config.compute.micro_batches > 1:
        notes.append("note  BatchNorm layers use the statistics of each micro-batch")
    elif any(len(row) > 1 for _, row in recommended.placement.table):
        if config.compute.batch_norm == "rank":
            notes.append("note  BatchNorm layers use the statistics of each rank's own images")
        else:
            notes.append("note  compute.batch_norm=sync needs a GPU per rank")
    if not recommended.fits:
        notes.append(
            f"note  no placement fits into memory; this one needs {_memory(recommended)} on a rank"
        )
    return notes


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _memory(prediction: Prediction) -> str:
    """Describe the memory per rank, from the smallest to the largest."""
    largest_bytes = max(prediction.memory_bytes)
    divisor, unit = (1e9, "GB") if largest_bytes >= 1e9 else (1e6, "MB")
    smallest, largest = (f"{f(prediction.memory_bytes) / divisor:.3g}" for f in (min, max))
    return f"{largest} {unit}" if smallest == largest else f"{smallest}-{largest} {unit}"
