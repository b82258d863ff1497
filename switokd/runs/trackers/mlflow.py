"""MLflow: one MLflow run per run, in files or on a server.

The store is `tracking_uri`, else the environment's MLFLOW_TRACKING_URI, else files in mlruns/ of
the current folder. A run that continues goes on in the same MLflow run.

Not covered: the numbers and their names (`numbers.py`); weights as artifacts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from switokd.config.dotted import flatten
from switokd.runs.trackers.state import TrackerState
from switokd.runs.trackers.tracker import Tracker, optional
from switokd.runtime.lifecycle import Terminated
from switokd.training.observer import ObservedRun

ALLOW_FILES = "MLFLOW_ALLOW_FILE_STORE"
"""Without this variable, newer versions of MLflow refuse files."""
BATCH, LETTERS = 100, 500
"""What a store takes: parameters in one call, letters of a value."""


class MLflow(Tracker):
    """Writes an MLflow run.

    tracking_uri: where to; None: as above. experiment: its name; None: the run's name. UsageError
    if MLflow is not installed.
    """

    def __init__(self, tracking_uri: str | None = None, experiment: str | None = None) -> None:
        super().__init__()
        self._mlflow = optional("mlflow", "mlflow")
        uri = (
            tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{Path('mlruns').absolute()}"
        )
        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault(ALLOW_FILES, "true")
        self._client = self._mlflow.MlflowClient(tracking_uri=uri)
        self._experiment = experiment

    def open(self, run: ObservedRun) -> None:
        """Begin an MLflow run, or continue that of an earlier process."""
        state = TrackerState(run.folder)
        before = state.get("mlflow")
        if before is not None and self._continue(before):
            return
        name = self._experiment or run.config.name
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        tags = {"switokd.run_id": run.id, "switokd.run_folder": str(run.folder.absolute())}
        made = self._client.create_run(experiment, tags=tags, run_name=run.folder.name)
        self._id: str = made.info.run_id
        state.set("mlflow", self._id)
        settings = flatten(run.config.model_dump(mode="json"))
        entities = self._mlflow.entities
        params = [entities.Param(key, str(value)[:LETTERS]) for key, value in settings.items()]
        for begin in range(0, len(params), BATCH):
            self._client.log_batch(self._id, params=params[begin : begin + BATCH])

    def _continue(self, run_id: str) -> bool:
        """Go on in an MLflow run; False if the store does not have it."""
        try:
            metrics = self._client.get_run(run_id).data.metrics
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self._id = run_id
        for name in metrics:
            history = self._client.get_metric_history(run_id, name)
            self.last[name] = max(metric.step for metric in history)
        self._client.update_run(run_id, status="RUNNING")
        return True

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers in one call."""
        now, kind = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [kind(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, error: BaseException | None) -> None:
        """Set the status of the MLflow run."""
        is_killed = isinstance(error, (Terminated, KeyboardInterrupt))
        status = "FINISHED" if error is None else "KILLED" if is_killed else "FAILED"
        self._client.set_terminated(self._id, status)
