"""The run folder: files that a run leaves behind. Only rank 0 writes them.

    config.yaml            the effective configuration
    run.json               the run's id, and how often it was started (`coordination/join.py`)
    signature.json         input format of the networks, and the classes (`data/signature.py`)
    profiles/NxT.json      measurements of placement: auto on N processes with T threads
    decisions.jsonl        the decision log: one line per step and pair
    metrics.jsonl          one line per epoch and network
    weights/NAME.pt        state dict of a network after the last step
    weights/NAME.ema.pt    moving average of the weights
    weights/best/NAME.pt   state dict of the epoch with the best test top-1
    weights/initial/       state dicts before the first step, if requested
    checkpoints/step-N/    what the run continues from (`checkpoints.py`)
    set-aside-N/           record and checkpoints of a start that could not be continued
    commands.jsonl         commands that it has taken (`coordination/command_file.py`)
    observers.json         what trackers remember (`trackers/state.py`)
    tensorboard/, wandb/   what trackers write
    attempts.jsonl         when the run was started, and what was lost (`attempts.py`)
    warnings.jsonl         warnings that it has printed, if any (`runtime/kept_warnings.py`)
    summary.json           written last
    curves.png             gap, threshold and accuracy (`curves.py`)

Folders of weights and checkpoints hold checksums in SHA256SUMS (`durable.py`).

Not covered: whether the folder can be made (`run_dir.py`); cutting the record of a run that
continues (`resume.py`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from switokd.config.config import Config
from switokd.coordination.command_file import COMMANDS
from switokd.data.signature import InputSignature
from switokd.distillation.decision import Decision, PairDecision
from switokd.errors import UsageError
from switokd.planning.profile import Profile
from switokd.runs.attempts import Attempts
from switokd.runs.record_file import RecordFile
from switokd.runs.resume import Resumption, cut
from switokd.runs.run_dir import make_run_dir, taken, writing
from switokd.runs.weights_files import WeightsFiles
from switokd.runtime.durable import replace_file
from switokd.runtime.environment import ProcessLayout
from switokd.runtime.lifecycle import print_warning
from switokd.runtime.waiting import waiting

WARNINGS = "warnings.jsonl"
"""File of warnings."""

RECORD_SECONDS = 60.0
"""How long a checkpoint waits for the record of its step."""

LOCK_SECONDS = 10.0
"""How long a run waits for the last process of an earlier one in the same folder."""


class RunFolder:
    """Folder of one run. Methods raise UsageError if the folder cannot be written.

    Only decisions, metrics and weights can wait for space on the disk.
    """

    def __init__(
        self,
        config: Config,
        resumption: Resumption | None = None,
        started: float | None = None,
        on_warning: Callable[[str], None] = print_warning,
    ) -> None:
        """Create the folder and write config.yaml, or open that of a run that continues.

        Nothing in the folder of a run that continues changes before `begin`.

        started: when the command was started, in seconds of `time.time`; None: now.
        on_warning: receives a sentence for the user, such as that the disk is full.
        UsageError if the folder of a new run is not empty, or if another process trains in it.
        """
        self.path = resumption.folder if resumption else make_run_dir(config)
        self._config, self._resumption = config, resumption
        self._started = started if started is not None and not resumption else time.time()
        self._recorded = threading.Condition()
        self._last_step = resumption.step if resumption else 0
        with writing(self.path):
            path = self.path / "config.yaml"
            # Mode "x": if two runs start in the same empty folder, one of them fails here.
            try:
                self._lock = path.open("r+" if resumption else "x", encoding="utf-8")
            except FileExistsError:
                raise taken(self.path) from None
            with waiting(f"another process that trains in {self.path} to end", LOCK_SECONDS):
                _lock(self._lock, self.path)
            self.attempts = Attempts(self.path)
            if not resumption:
                self._write_config()
            self._decisions, self._metrics = (
                RecordFile(self.path / name, on_warning)
                for name in ("decisions.jsonl", "metrics.jsonl")
            )
        self.weights = WeightsFiles(self.path, on_warning)

    def begin(self) -> None:
        """Note this start; cut back a run that continues, and write its configuration.

        Called when the first step follows, so that a start that fails before it destroys nothing.
        """
        with writing(self.path):
            lost = self._resumption.steps_lost if self._resumption else 0
            self.attempts.start(self._last_step, lost, self._started)
            if self._resumption:
                cut(self.path, self._resumption.step)
                self._write_config()

    def _write_config(self) -> None:
        self._lock.seek(0)
        self._lock.write(self._config.dump())
        self._lock.truncate()
        self._lock.flush()
        os.fsync(self._lock.fileno())

    def save_signature(self, signature: InputSignature) -> None:
        """Write signature.json, so that networks can be used without their data set."""
        with writing(self.path):
            signature.save(self.path / "signature.json")

    def save_profiles(self, profiles: Mapping[ProcessLayout, Profile]) -> None:
        """Write profiles/NxT.json for each process layout, for the setting `auto.profiles`."""
        for layout, profile in profiles.items():
            path = self.path / "profiles" / f"{layout.code}.json"
            with writing(self.path):
                path.parent.mkdir(exist_ok=True)
            profile.save(path)

    def add_decision(self, decision: Decision) -> None:
        """Append the decision of one step to decisions.jsonl, one line per pair."""
        lines = (_decision_line(decision.step, p) for p in decision.pairs)
        self._decisions.append("".join(json.dumps(line) + "\n" for line in lines))
        with self._recorded:
            self._last_step = decision.step
            self._recorded.notify_all()

    def sync_record(self, step: int) -> None:
        """Put record and weights on the disk; waits for the decision of `step`.

        Called on another thread than `add_decision`. OSError if the decision does not come, or if
        the disk is full.
        """
        with self._recorded:
            if not self._recorded.wait_for(lambda: self._last_step >= step, RECORD_SECONDS):
                raise OSError(errno.ETIMEDOUT, f"the decision of step {step} was not recorded")
        self._decisions.sync()
        self._metrics.sync()
        self.weights.sync()

    def add_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Append the numbers of one epoch to metrics.jsonl, one line per network."""
        self._metrics.append("".join(json.dumps(line) + "\n" for line in lines))

    def add_warning(self, warning: Mapping[str, Any]) -> None:
        """Append to warnings.jsonl; a warning that the disk does not take is lost."""
        with suppress(OSError), (self.path / WARNINGS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(warning, ensure_ascii=False) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write what waits for the disk, and summary.json; close the record."""
        with writing(self.path):
            self.weights.sync()
            self.close()
            self.attempts.finish(self._last_step)
            replace_file(
                self.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode()
            )

    def close(self) -> None:
        """Close the files of the record; OSError if lines that wait for the disk are lost."""
        try:
            self._decisions.close()
            self._metrics.close()
        finally:
            self._lock.close()

    def discard_if_unused(self) -> None:
        """Remove the folder if the run ended before its first decision."""
        with suppress(OSError):
            self.close()
            if not (self.path / "decisions.jsonl").stat().st_size and not self._resumption:
                for child in self.path.iterdir():
                    if child.name != COMMANDS:  # somebody has put it there
                        shutil.rmtree(child) if child.is_dir() else child.unlink()
                self.path.rmdir()


def _decision_line(step: int, p: PairDecision) -> dict[str, Any]:
    d = p.distances
    return {
        "step": step,
        "teacher": p.pair.teacher,
        "student": p.pair.student,
        "gap": d.gap,
        "e_s": d.e_s,
        "e_t": d.e_t,
        "epsilon": p.epsilon,
        "delta": p.delta,
        "mode": p.mode.value,
        "n": d.n,
        **({"held": True} if p.held else {}),
        **({"delta_scale": p.delta_scale} if p.delta_scale != 1 else {}),
    }


def _lock(file: IO[str], folder: Path) -> None:
    """Lock the folder's config.yaml until it is closed; the lock ends with this process.

    A run that was just killed may need a moment to end. UsageError if the lock is not free then.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise UsageError(
                    f"run_dir: another process trains in {folder}; wait for its end, or choose "
                    "another folder"
                ) from None
        time.sleep(0.1)
