"""What rank 0 does beside training: the record, the progress bar, the closing report.

Not covered: how each is done (`run_folder.py`, `progress.py`, `curves.py`).
"""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from switokd.config.config import Config
from switokd.distillation.decision import Decision
from switokd.runs import curves, savings
from switokd.runs.progress import PausedShare, ProgressBar
from switokd.runs.run_folder import RunFolder
from switokd.runs.summary import print_table
from switokd.runtime.placement import Placement
from switokd.training.meters import WaitingTimes
from switokd.training.step import StepResult


@dataclass
class NetworkSummary:
    """One network's course so far; top-1 in percent."""

    role: str = ""
    parameters: int = 0
    steps: int = 0
    steps_paused: int = 0
    samples: int = 0
    top1_last: float = 0.0
    top1_best: float = 0.0
    best_epoch: int = 0
    """Epoch, counted from 1, after which top1_best was reached for the first time."""
    top1_ema_last: float | None = None
    top1_ema_best: float | None = None
    """Of the moving average; None where there is none."""


class RunRecorder:
    """Rank 0's desk. UsageError if the run folder cannot be made."""

    def __init__(self, config: Config, placement: Placement, steps: int) -> None:
        self.folder = RunFolder(config)
        self.paused = PausedShare(config.topology)
        self.bar = ProgressBar(config.name, steps, config.schedule.epochs, self.paused)
        self.parameters: dict[str, int] = {}
        self.waiting: list[WaitingTimes] = []
        self.improved: list[str] = []
        """Networks whose test top-1 was better in the last epoch than ever before."""
        self._config, self._placement = config, placement
        self._started = time.monotonic()
        self._training_seconds = 0.0
        self._summaries = {name: NetworkSummary() for name in config.topology}
        self._passed_at: list[dict[int, float]] = [{}]
        """By epoch, when each step's exchange was over."""
        self._paused_at: dict[int, Sequence[str]] = {}
        self._learning: list[dict[str, float]] = []

    def on_decision(self, decision: Decision) -> None:
        """Keep a decision; called on the client's thread."""
        self.folder.add_decision(decision)
        self.paused.add(decision)
        self._paused_at[decision.step] = decision.paused

    def step(self, step: int, epoch: int, result: StepResult, passed_at: float) -> None:
        """Note when a step's exchange was over, and show the step."""
        self._passed_at[-1][step] = passed_at
        self.bar.step(step, epoch, result)

    def epoch(self, epoch: int, step: int, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Keep and show one epoch's numbers: a row per rank and network, a line per network.

        Returns the networks' accuracies on the test set, 0 to 1; none in an epoch without a test.
        """
        by_network = defaultdict(list)
        for row in rows:
            by_network[row["network"]].append(row)
        self.improved = []
        lines = [self._line(epoch, step, name, by_network[name]) for name in self._config.topology]
        self._training_seconds += max(row["training_seconds"] for row in rows)
        self._passed_at.append({})  # between two epochs lies evaluation
        self._learning += rows
        self.folder.add_metrics(lines)
        tested = [line for line in lines if line["test_top1"] is not None]
        test_top1 = {line["network"]: line["test_top1"] / 100 for line in tested}
        self.bar.epoch(epoch, test_top1)
        return test_top1

    def _line(self, epoch: int, step: int, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One network's epoch, its ranks' sums added up."""
        total = {
            key: sum(row[key] for row in rows)
            for key in ("loss_sum", "learned", "correct", "samples")
        }
        seconds = max(row["training_seconds"] for row in rows)
        network_summary = self._summaries[name]
        network_summary.role, network_summary.parameters, network_summary.steps = (
            rows[0]["role"],
            self.parameters[name],
            step,
        )
        network_summary.steps_paused += rows[0]["steps_paused"]
        network_summary.samples += total["samples"]
        test_top1, ema = _percent(rows, "tested"), _percent(rows, "tested_average")
        self._note_test(name, epoch + 1, test_top1, ema)
        return {
            "epoch": epoch + 1,
            "step": step,
            "network": name,
            "role": network_summary.role,
            "loss": total["loss_sum"] / total["learned"] if total["learned"] else None,
            "train_top1": 100 * total["correct"] / total["samples"],
            "test_top1": test_top1,
            "test_top1_ema": ema,
            "lr": rows[0]["lr"],
            "steps_paused": network_summary.steps_paused,
            "samples_per_second": total["samples"] / seconds,
        }

    def _note_test(self, name: str, epoch: int, top1: float | None, ema: float | None) -> None:
        """Keep one network's test results, in percent; None where there are none."""
        network_summary = self._summaries[name]
        if top1 is not None:
            network_summary.top1_last = top1
            if top1 > network_summary.top1_best or not network_summary.best_epoch:
                network_summary.top1_best, network_summary.best_epoch = top1, epoch
                self.improved.append(name)
        if ema is not None:
            network_summary.top1_ema_last = ema
            network_summary.top1_ema_best = max(ema, network_summary.top1_ema_best or 0.0)

    def finish(self) -> None:
        """Write the summary, draw the picture, print the table."""
        summary = self._summary()
        self.folder.finish(summary)
        picture = curves.draw_curves(self.folder.path)
        print_table(self.bar.console, summary)
        for what, where in (
            ("run folder", self.folder.path),
            ("picture", picture),
            ("metrics", self.folder.path / "metrics.jsonl"),
            ("decisions", self.folder.path / "decisions.jsonl"),
        ):
            self.bar.console.print(f"{what:<11} {where}")

    def _summary(self) -> dict[str, Any]:
        student = self._summaries[self._config.topology.students[0]]
        waits = sorted(wait for rank in self.waiting for wait in rank.decision_seconds)
        return {
            "name": self._config.name,
            "topology": self._config.topology.name,
            "strategy": self._config.distillation.strategy,
            "seed": self._config.seed,
            "world_size": self._placement.world_size,
            "placement": str(self._placement),
            "placement_table": {name: dict(row) for name, row in self._placement.table},
            "samples_per_second": student.samples / self._training_seconds,
            "wall_seconds": time.monotonic() - self._started,
            "training_seconds": self._training_seconds,
            "saved_by_pauses": {
                "wall_seconds": savings.wall_seconds(self._passed_at, self._paused_at),
                "device_seconds": savings.device_seconds(self._learning),
                "teachers_device_seconds": savings.teachers_device_seconds(self._learning),
            },
            "waiting": {
                "decision_mean_seconds": sum(waits) / len(waits) if waits else 0.0,
                "decision_p99_seconds": waits[int(0.99 * len(waits))] if waits else 0.0,
                "exchange_seconds_by_rank": [rank.exchange_seconds for rank in self.waiting],
            },
            "torch": torch.__version__,
            "python": platform.python_version(),
            "networks": {
                name: asdict(network_summary) for name, network_summary in self._summaries.items()
            },
        }


def _percent(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Top-1 over all ranks' parts of the test set, in percent; None where nothing was tested."""
    parts = [row[key] for row in rows if row[key] is not None]
    if not parts:
        return None
    return float(100 * sum(correct for correct, _ in parts) / sum(n for _, n in parts))
