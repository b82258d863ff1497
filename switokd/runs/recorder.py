"""Writes the run folder while rank 0 trains, and the summary at the end.

Not covered: the files' formats (`run_folder.py`), the picture (`curves.py`), the closing table
(`summary.py`).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from switokd.config.config import Config
from switokd.distillation.decision import Decision
from switokd.runs import savings
from switokd.runs.checkpoints import CheckpointWriter
from switokd.runs.curves import draw_curves
from switokd.runs.resume import Resumption, paused_by_step
from switokd.runs.run_folder import RunFolder
from switokd.runs.summary import print_table
from switokd.runtime.lifecycle import print_warning
from switokd.runtime.placement import Placement
from switokd.training.meters import WaitingTimes
from switokd.training.metrics import EpochMetrics, NetworkMetrics, Row
from switokd.training.observer import Observer
from switokd.training.step import StepResult


@dataclass
class NetworkSummary:
    """One network's results so far; top-1 accuracies are in percent."""

    role: str = ""
    parameters: int = 0
    steps: int = 0
    steps_paused: int = 0
    samples: int = 0
    top1_last: float = 0.0
    top1_best: float = 0.0
    best_epoch: int = 0
    """Epoch, counted from 1, that reached top1_best first."""
    top1_ema_last: float | None = None
    top1_ema_best: float | None = None
    """Accuracies of the moving average; None without an average."""

    def add(self, metrics: NetworkMetrics, epoch: int, step: int) -> None:
        """Add one epoch, counted from 1, with its last step."""
        self.role, self.steps = metrics.role, step
        self.steps_paused += metrics.steps_paused
        self.samples += metrics.samples
        if metrics.test_top1 is not None:
            self.top1_last = metrics.test_top1
            if metrics.test_top1 > self.top1_best or not self.best_epoch:
                self.top1_best, self.best_epoch = metrics.test_top1, epoch
        if metrics.test_top1_ema is not None:
            self.top1_ema_last = metrics.test_top1_ema
            self.top1_ema_best = max(metrics.test_top1_ema, self.top1_ema_best or 0.0)


class RunRecorder(Observer):
    """Writes one run's folder.

    parameters: number of parameters by network. resumption: where the run continues; None: it is
    new. started: when the command was started, in seconds of `time.time`. on_warning: receives a
    sentence for the user. UsageError if the folder cannot be written.
    """

    def __init__(
        self,
        config: Config,
        placement: Placement,
        parameters: Mapping[str, int],
        resumption: Resumption | None = None,
        started: float | None = None,
        on_warning: Callable[[str], None] = print_warning,
    ) -> None:
        self.folder = RunFolder(config, resumption, started, on_warning)
        self._checkpoints = CheckpointWriter(
            self.folder.path, config.checkpoint.keep, self.folder.sync_record, on_warning
        )
        self._config, self._placement = config, placement
        self._started = time.monotonic()
        self._training_seconds = 0.0
        self._summaries = {
            name: NetworkSummary(parameters=parameters[name]) for name in config.topology
        }
        self._exchanged_at: list[dict[int, float]] = [{}]
        """By epoch and step: when the step's exchange was complete."""
        self._paused: dict[int, Sequence[str]] = {}
        """By step: the paused teachers."""
        self._rows: list[Row] = []
        self._skipped: list[dict[str, Any]] = []
        if resumption and resumption.state:
            self._restore(resumption)

    def on_begin(self) -> None:
        """Cut the record back, and note that the time back to the checkpoint was lost."""
        self.folder.begin()
        self.folder.attempts.begin_training()

    def on_decision(self, decision: Decision) -> None:
        """Append the decision to the decision log."""
        self.folder.add_decision(decision)
        self._paused[decision.step] = decision.paused

    def on_step(self, step: int, epoch: int, result: StepResult) -> None:
        """Note when the step's exchange was complete."""
        self._exchanged_at[-1][step] = result.exchanged_at

    def on_skipped(self, step: int, reason: str) -> None:
        """Note the step and the reason for the summary."""
        self._skipped.append({"step": step, "reason": reason})

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Write one line of metrics per network."""
        self._exchanged_at.append({})  # the evaluation separates two epochs
        self._training_seconds += metrics.training_seconds
        self._rows += metrics.rows
        for network in metrics.networks:
            summary = self._summaries[network.network]
            summary.add(network, metrics.epoch + 1, metrics.step)
        self.folder.add_metrics([self._line(metrics, network) for network in metrics.networks])

    def on_weights(self, folder: str, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Save state dicts to `folder` within the run folder."""
        self.folder.weights.save(states, folder)

    def on_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """Queue the checkpoint of `step` together with this recorder's own sums."""
        own = {
            "training_seconds": self._training_seconds,
            "wall_seconds": self._wall_seconds,
            "summaries": {name: asdict(summary) for name, summary in self._summaries.items()},
            "rows": [dict(row) for row in self._rows],
            "exchanged_at": [
                {
                    "steps": torch.tensor(list(epoch), dtype=torch.int64),
                    "seconds": torch.tensor(list(epoch.values()), dtype=torch.float64),
                }
                for epoch in self._exchanged_at
            ],
            "skipped": [dict(line) for line in self._skipped],
            "kept": self.folder.attempts.kept(),
        }
        run = {"step": step, "name": self._config.name, "placement": str(self._placement)}
        whole = {**state, "run": {**state["run"], "recorder": own}}
        self._checkpoints.put(step, whole, run)

    def settle(self) -> None:
        """Wait until all queued checkpoints are written; no later one is."""
        self._checkpoints.close()

    def _restore(self, resumption: Resumption) -> None:
        """Continue with the sums of the checkpoint and the decisions of the record."""
        own = resumption.state["run"]["recorder"]
        self._training_seconds = own["training_seconds"]
        self._started -= own["wall_seconds"]
        if "kept" in own:  # not in a checkpoint of an earlier version
            self.folder.attempts.restore(own["kept"])
        self._summaries = {name: NetworkSummary(**s) for name, s in own["summaries"].items()}
        self._rows = own["rows"]
        self._skipped = own.get("skipped", [])
        self._exchanged_at = [
            dict(zip(epoch["steps"].tolist(), epoch["seconds"].tolist(), strict=True))
            for epoch in own["exchanged_at"]
        ]
        self._exchanged_at.append({})  # times of two processes cannot be compared
        self._paused.update(paused_by_step(self.folder.path, resumption.step))

    @property
    def _wall_seconds(self) -> float:
        return time.monotonic() - self._started

    def _line(self, metrics: EpochMetrics, network: NetworkMetrics) -> dict[str, Any]:
        """Return one network's line of metrics.jsonl."""
        return {
            "epoch": metrics.epoch + 1,
            "step": metrics.step,
            "network": network.network,
            "role": network.role,
            "loss": network.loss,
            "train_top1": network.train_top1,
            "test_top1": network.test_top1,
            "test_top1_ema": network.test_top1_ema,
            "lr": network.lr,
            "steps_paused": self._summaries[network.network].steps_paused,
            "samples_per_second": network.samples_per_second,
        }

    def finish(
        self,
        waiting_times: Sequence[WaitingTimes],
        console: Console,
        draw: Callable[[Path], object] = draw_curves,
    ) -> None:
        """Write the summary, draw the curves, and print the closing table.

        draw: draws curves.png into the run folder, or has it drawn by another process.
        """
        self.settle()
        summary = self._summary(waiting_times)
        self.folder.finish(summary)
        draw(self.folder.path)
        print_table(console, summary)
        for title, path in (
            ("run folder", self.folder.path),
            ("picture", self.folder.path / "curves.png"),
            ("metrics", self.folder.path / "metrics.jsonl"),
            ("decisions", self.folder.path / "decisions.jsonl"),
        ):
            console.print(f"{title:<11} {path}")

    def _summary(self, waiting_times: Sequence[WaitingTimes]) -> dict[str, Any]:
        student = self._summaries[self._config.topology.students[0]]
        waits = sorted(wait for rank in waiting_times for wait in rank.decision_seconds)
        alone = {step for rank in waiting_times for step in rank.alone_steps}
        return {
            "name": self._config.name,
            "topology": self._config.topology.name,
            "strategy": self._config.distillation.strategy,
            "seed": self._config.seed,
            "world_size": self._placement.world_size,
            "placement": str(self._placement),
            "placement_table": {name: dict(row) for name, row in self._placement.table},
            "samples_per_second": student.samples / self._training_seconds,
            "wall_seconds": self._wall_seconds,
            "training_seconds": self._training_seconds,
            **self.folder.attempts.summary(self._training_seconds),
            "steps_decided_alone": len(alone),
            "decided_alone": _ranges(alone),
            "skipped_steps": self._skipped,
            "saved_by_pauses": {
                "wall_seconds": savings.wall_seconds(self._exchanged_at, self._paused),
                "device_seconds": savings.device_seconds(self._rows),
                "teachers_device_seconds": savings.teachers_device_seconds(self._rows),
            },
            "waiting": {
                "decision_mean_seconds": sum(waits) / len(waits) if waits else 0.0,
                "decision_p99_seconds": waits[int(0.99 * len(waits))] if waits else 0.0,
                "exchange_seconds_by_rank": [rank.exchange_seconds for rank in waiting_times],
            },
            "torch": torch.__version__,
            "python": platform.python_version(),
            "networks": {name: asdict(summary) for name, summary in self._summaries.items()},
        }


def _ranges(steps: Iterable[int]) -> list[list[int]]:
    """Return steps as ascending ranges, each with its first and last step."""
    ranges: list[list[int]] = []
    for step in sorted(steps):
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ranges
