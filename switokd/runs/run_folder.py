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
    attempts.jsonl         when the run was started, and what was lost (`attempts.py`)
    summary.json           written last
    curves.png             gap, threshold and accuracy (`curves.py`)

Folders of weights and checkpoints hold checksums in SHA256SUMS (`durable.py`).

Not covered: cutting the record of a run that continues (`resume.py`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from switokd.config.config import Config
from switokd.data.signature import InputSignature
from switokd.distillation.decision import Decision, PairDecision
from switokd.errors import UsageError
from switokd.planning.profile import Profile
from switokd.runs.attempts import Attempts
from switokd.runs.resume import Resumption, cut
from switokd.runtime.durable import replace_file, write_with_sum
from switokd.runtime.environment import ProcessLayout

RECORD_SECONDS = 60.0
"""How long a checkpoint waits for the record of its step."""

LOCK_SECONDS = 10.0
"""How long a run waits for the last process of an earlier one in the same folder."""


class RunFolder:
    """Folder of one run. Every method raises UsageError if the folder cannot be written."""

    def __init__(
        self,
        config: Config,
        resumption: Resumption | None = None,
        started: float | None = None,
    ) -> None:
        """Create the folder and write config.yaml, or open that of a run that continues.

        Nothing in the folder of a run that continues changes before `begin`.

        started: when the command was started, in seconds of `time.time`; None: now.
        UsageError if the folder of a new run is not empty, or if another process trains in it.
        """
        self.path = resumption.folder if resumption else _make(config)
        self._config, self._resumption = config, resumption
        self._started = started if started is not None and not resumption else time.time()
        self._recorded = threading.Condition()
        self._last_step = resumption.step if resumption else 0
        with _writing(self.path):
            path = self.path / "config.yaml"
            # Mode "x": if two runs start in the same empty folder, one of them fails here.
            try:
                self._lock = path.open("r+" if resumption else "x", encoding="utf-8")
            except FileExistsError:
                raise _taken(self.path) from None
            _lock(self._lock, self.path)
            self.attempts = Attempts(self.path)
            if not resumption:
                self._write_config()
            self._decisions = (self.path / "decisions.jsonl").open("a", encoding="utf-8")

    def begin(self) -> None:
        """Note this start; cut back a run that continues, and write its configuration.

        Called when the first step follows, so that a start that fails before it destroys nothing.
        """
        with _writing(self.path):
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
        with _writing(self.path):
            signature.save(self.path / "signature.json")

    def save_profiles(self, profiles: Mapping[ProcessLayout, Profile]) -> None:
        """Write profiles/NxT.json for each process layout, for the setting `auto.profiles`."""
        for layout, profile in profiles.items():
            path = self.path / "profiles" / f"{layout.code}.json"
            with _writing(self.path):
                path.parent.mkdir(exist_ok=True)
            profile.save(path)

    def add_decision(self, decision: Decision) -> None:
        """Append the decision of one step to decisions.jsonl, one line per pair."""
        with _writing(self.path):
            for p in decision.pairs:
                self._decisions.write(json.dumps(_decision_line(decision.step, p)) + "\n")
            self._decisions.flush()
        with self._recorded:
            self._last_step = decision.step
            self._recorded.notify_all()

    def sync_record(self, step: int) -> None:
        """Put the record up to `step` on the disk; waits until the decision of `step` is written.

        Called on another thread than `add_decision`. OSError if the decision does not come.
        """
        with self._recorded:
            if not self._recorded.wait_for(lambda: self._last_step >= step, RECORD_SECONDS):
                raise OSError(errno.ETIMEDOUT, f"the decision of step {step} was not recorded")
        os.fsync(self._decisions.fileno())
        with suppress(FileNotFoundError), (self.path / "metrics.jsonl").open("rb") as file:
            os.fsync(file.fileno())

    def add_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Append the numbers of one epoch to metrics.jsonl, one line per network."""
        path = self.path / "metrics.jsonl"
        with _writing(self.path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def save_weights(self, states: Mapping[str, Mapping[str, Tensor]], folder: str) -> None:
        """Write the state dict of each network to `folder`/NAME.pt, for `torch.load`.

        states: state dicts by network. An existing file is replaced after the new file is complete,
        and the file's checksum is noted in SHA256SUMS.
        """
        with _writing(self.path):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
            for name, state in states.items():
                buffer = BytesIO()  # torch.save to a file would hide the OSError of a full disk
                torch.save(dict(state), buffer)
                write_with_sum(self.path / folder, f"{name}.pt", buffer.getbuffer())

    def finish(self, summary: dict[str, Any]) -> None:
        """Close decisions.jsonl and write summary.json."""
        with _writing(self.path):
            self.close()
            self.attempts.finish(self._last_step)
            replace_file(
                self.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode()
            )

    def close(self) -> None:
        """Close decisions.jsonl; its lines stay."""
        self._decisions.close()
        self._lock.close()

    def discard_if_unused(self) -> None:
        """Remove the folder if the run ended before its first decision."""
        with suppress(OSError):
            self.close()
            if not (self.path / "decisions.jsonl").stat().st_size and not self._resumption:
                shutil.rmtree(self.path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"run_dir: {path} cannot be written: {error.strerror}") from error


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


def check_run_dir(config: Config) -> None:
    """UsageError if the setting `run_dir` names a file or a folder that is not empty."""
    if config.run_dir is None:
        return
    path = Path(config.run_dir)
    if config.resume == "auto" and (path / "config.yaml").exists():
        return
    if path.exists() and not path.is_dir():
        raise UsageError(f"run_dir: {path} is a file; choose a new or an empty folder")
    with _writing(path):
        is_taken = path.is_dir() and any(path.iterdir())
    if is_taken:
        raise _taken(path)


def _make(config: Config) -> Path:
    if config.run_dir is not None:
        check_run_dir(config)
        path = Path(config.run_dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"run_dir: {path} cannot be created: {error.strerror}") from None
        return path
    for number in count(1):
        path = Path("runs") / f"{config.name}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"{path} cannot be created: {error.strerror}; set run_dir") from None
        return path
    raise AssertionError("unreachable")


def _taken(path: Path) -> UsageError:
    return UsageError(
        f"run_dir: {path} is not empty, and a run never overwrites files; choose another folder, "
        "or remove this folder first"
    )
