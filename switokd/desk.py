"""What rank 0 does beside training: the record, the progress bar, the closing report.

Not covered: how each is done (`run_folder.py`, `telemetry.py`, `report.py`).
"""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from switokd import report
from switokd.config import Config
from switokd.decision import Decision
from switokd.run_folder import RunFolder
from switokd.telemetry import PausedShare, ProgressBar


@dataclass
class Tally:
    """One network's course so far; top-1 in percent."""

    network: str
    role: str
    parameters: int
    steps: int = 0
    steps_paused: int = 0
    samples: int = 0
    top1_last: float = 0.0
    top1_best: float = 0.0


class Desk:
    """Rank 0's desk. UsageError if the run folder cannot be made."""

    def __init__(self, config: Config, steps: int) -> None:
        self.folder = RunFolder(config)
        self.paused = PausedShare(config.topology)
        self.bar = ProgressBar(config.name, steps, config.schedule.epochs, self.paused)
        self._config = config
        self._started = time.monotonic()

    def on_decision(self, decision: Decision) -> None:
        """Keep a decision; called on the client's thread."""
        self.folder.add_decision(decision)
        self.paused.add(decision)

    def epoch(self, epoch: int, lines: list[dict[str, Any]]) -> None:
        """Keep and show one epoch's numbers, a line per network."""
        self.folder.add_metrics(lines)
        self.bar.epoch(epoch, {line["network"]: line["test_top1"] / 100 for line in lines})

    def finish(self, tallies: list[Tally], training_seconds: float) -> None:
        """Write the summary, draw the picture, print the table."""
        networks = {}
        for tally in tallies:
            fields = asdict(tally)
            networks[fields.pop("network")] = fields
        summary = {
            "name": self._config.name,
            "topology": self._config.topology.name,
            "strategy": self._config.distillation.strategy,
            "seed": self._config.seed,
            "world_size": len(tallies),
            "samples_per_second": tallies[0].samples / training_seconds,
            "wall_seconds": time.monotonic() - self._started,
            "training_seconds": training_seconds,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "networks": networks,
        }
        self.folder.finish(summary)
        picture = report.draw_curves(self.folder.path)
        report.print_table(self.bar.console, summary)
        for what, where in (
            ("run folder", self.folder.path),
            ("picture", picture),
            ("metrics", self.folder.path / "metrics.jsonl"),
            ("decisions", self.folder.path / "decisions.jsonl"),
        ):
            self.bar.console.print(f"{what:<11} {where}")
