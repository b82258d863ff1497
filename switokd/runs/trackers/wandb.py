"""Weights & Biases: one run per run, offline in RUN_FOLDER/wandb unless asked otherwise.

`wandb sync` uploads an offline run later. The environment's WANDB_MODE and WANDB_PROJECT are
obeyed. A run that continues has the same id.

The package keeps rows in another process for a while, and loses them if that process is killed as
well. All rows are therefore in RUN_FOLDER/wandb/rows.jsonl too. A run that continues writes those
that the offline files lack, and none twice.

Not covered: the numbers and their names (`numbers.py`); weights as artifacts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from switokd.runs.json_lines import read_lines
from switokd.runs.record_file import RecordFile
from switokd.runs.trackers.tracker import Tracker, optional
from switokd.runs.trackers.wandb_files import rows
from switokd.runtime.lifecycle import Terminated, print_error
from switokd.training.observer import ObservedRun

ROWS = "wandb/rows.jsonl"


class WandB(Tracker):
    """Writes a run of Weights & Biases.

    project: None: WANDB_PROJECT, else "switokd". mode: online or offline; None: WANDB_MODE, else
    offline. entity: None: the account's own. UsageError if the package is not installed.
    """

    def __init__(
        self, project: str | None = None, mode: str | None = None, entity: str | None = None
    ) -> None:
        super().__init__()
        self._wandb = optional("wandb", "wandb")
        self._project = project or os.environ.get("WANDB_PROJECT") or "switokd"
        self._mode = mode or os.environ.get("WANDB_MODE") or "offline"
        self._entity = entity

    def open(self, run: ObservedRun) -> None:
        """Begin a run, or continue that of an earlier process."""
        self._tracked = self._wandb.init(
            project=self._project,
            entity=self._entity,
            id=run.id,
            name=run.folder.name,
            dir=str(run.folder),
            mode=self._mode,
            resume=None if self._mode == "offline" else "allow",
            config=run.config.model_dump(mode="json"),
            reinit="create_new",
            settings=self._wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        self._tracked.define_metric("*", step_metric="step")
        kept = run.folder / ROWS
        kept.parent.mkdir(exist_ok=True)
        before = read_lines(kept)
        self.last = _last_steps(before)
        # What is not offline has come to the server, as far as this process can know.
        written = _last_steps(rows(run.folder)) if self._mode == "offline" else self.last
        for row in before:
            missing = {name: v for name, v in row.items() if row["step"] > written.get(name, -1)}
            if missing:
                self._tracked.log(missing)
        self._kept = RecordFile(kept, print_error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row with its step."""
        row = {"step": step, **values}
        self._kept.append(json.dumps(row) + "\n")
        self._tracked.log(row)

    def close(self, error: BaseException | None) -> None:
        """Finish the run, as stopped or failed if it was."""
        code = 0 if error is None else 143 if isinstance(error, Terminated) else 1
        self._tracked.finish(exit_code=code)
        self._kept.close()


def _last_steps(found: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the last step of each number in rows."""
    last: dict[str, int] = {}
    for row in found:
        last.update(dict.fromkeys(row, int(row.get("step", 0))))
    return last
