"""Run the trials of a comparison as processes: one `switokd train` per trial.

The trials stay in the terminal's process group, so that they receive Ctrl-C and the closing of the
terminal directly.

Not covered: several machines; assigning a GPU to each of several trials that run at once.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from switokd.errors import PeerError, UsageError
from switokd.runs.compare.trials import Trial, TrialState
from switokd.runtime.environment import cores
from switokd.runtime.interpreter import python_command
from switokd.runtime.lifecycle import PARENT, Terminated
from switokd.runtime.log import plain_environment

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
"""Time for trials to end by themselves after the comparison is stopped."""
TAIL_BYTES = 4096
"""Size of the end of a log that is read for its last lines."""


@dataclass(frozen=True)
class Failure:
    """Exit code and reason of a failed trial."""

    exit_code: int
    reason: str


@dataclass(frozen=True)
class RunningTrial:
    """A trial whose process is running."""

    trial: Trial
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    """Start time on the monotonic clock."""

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


class Display(Protocol):
    """Receives the progress of the trials."""

    def started(self, trial: Trial) -> None:
        """Called when a trial starts."""

    def update(self, running: Sequence[RunningTrial]) -> None:
        """Called several times per second, with the trials that are running."""

    def ended(self, trial: Trial, seconds: float, failure: Failure | None) -> None:
        """Called when a trial ends, or, with 0 seconds, when it cannot run."""


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Create the folder `out` and lock it for one comparison; yields the lock's file descriptor.

    The trials inherit the descriptor. The folder therefore stays locked while a trial runs, even
    if the comparison itself was killed. UsageError if the folder is locked already, or cannot be
    written.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is a file; name a new folder, or that of a comparison")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--out: another comparison, or a run that it left behind, is at work in {out}; "
                "wait for its end, or choose another folder"
            ) from None
        yield lock.fileno()


def clear_unfinished(trials: Iterable[Trial]) -> list[Trial]:
    """Remove the folders of unfinished trials without a checkpoint, and return these trials.

    Folders of finished trials, and of trials that can be continued, are kept. UsageError if a
    folder holds another configuration, or cannot be removed.
    """
    cleared = []
    for trial in trials:
        if trial.state() is TrialState.UNFINISHED and not trial.has_checkpoint:
            try:
                shutil.rmtree(trial.folder)
            except OSError as error:
                raise UsageError(
                    f"{trial.folder} is unfinished and cannot be removed: {error.strerror}"
                ) from None
            cleared.append(trial)
    return cleared


def run_trials(
    trials: Sequence[Trial], jobs: int, logs: Path, lock: int, display: Display
) -> dict[Path, Failure]:
    """Run the trials, up to `jobs` at once; returns failures by folder, in the order of their ends.

    A trial waits for the trial that trains its teachers, and fails if that trial fails.
    logs: folder of the trials' output. lock: file descriptor that the trials inherit.
    """
    waiting, running = list(trials), list[RunningTrial]()
    failed: dict[Path, Failure] = {}
    try:
        while waiting or running:
            for ended in [r for r in running if r.process.poll() is not None]:
                running.remove(ended)
                failure = failure_of(ended)
                if failure:
                    failed[ended.trial.folder] = failure
                display.ended(ended.trial, ended.seconds, failure)
            for trial in _without_teachers(waiting, failed):
                waiting.remove(trial)
                display.ended(trial, 0.0, failed[trial.folder])
            busy = {t.folder for t in waiting} | {r.trial.folder for r in running}
            ready = [t for t in waiting if t.teachers_from not in busy]
            for trial in ready[: jobs - len(running)]:
                waiting.remove(trial)
                running.append(start(trial, jobs, logs, lock))
                display.started(trial)
            display.update(running)
            time.sleep(POLL_SECONDS)
    except Terminated:  # unlike Ctrl-C, SIGTERM reaches only this process
        for r in running:
            r.process.terminate()
        raise
    finally:
        stop([r.process for r in running])
    return failed


def _without_teachers(waiting: Sequence[Trial], failed: dict[Path, Failure]) -> list[Trial]:
    """Find trials whose teachers could not be trained, and add these trials to `failed`."""
    trials = [t for t in waiting if t.teachers_from in failed]
    for trial in trials:
        assert trial.teachers_from is not None
        code = failed[trial.teachers_from].exit_code
        reason = f"not run, because {trial.teachers_from}, which trains its teachers, failed"
        failed[trial.folder] = Failure(code, reason)
    return trials


def start(trial: Trial, jobs: int, logs: Path, lock: int) -> RunningTrial:
    """Start one trial; its output goes to a file in `logs`."""
    log = logs / f"{trial.folder.name}.log"
    arguments = ["train", *trial.arguments, "resume=auto"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(['switokd', 'train', *trial.arguments, 'resume=auto'])}\n")
        file.flush()
        process = subprocess.Popen(
            [*python_command("switokd"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={
                **threads(trial, jobs),
                **plain_environment(),
                "PYTHONUNBUFFERED": "1",
                PARENT: str(os.getpid()),
            },
            pass_fds=(lock,),
        )
    return RunningTrial(trial, process, log, time.monotonic())


def threads(trial: Trial, jobs: int) -> Mapping[str, str]:
    """Environment variables that share the cores among trials that run at once.

    A single trial needs none: `switokd train` chooses the number of threads itself.
    """
    if jobs == 1:
        return {}
    ranks = jobs * (trial.config.world_size or 1)
    return {"OMP_NUM_THREADS": str(max(cores() // ranks, 1))}


def failure_of(ended: RunningTrial) -> Failure | None:
    """Exit code and reason of an ended trial; None if it succeeded."""
    code = ended.process.returncode
    if code == 0:
        return None
    lines = last_lines(ended.log)
    errors = [line.removeprefix("switokd: ") for line in lines if line.startswith("switokd: ")]
    reason = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
    reason = ": ".join([reason, *(errors[:1] or lines[-1:])])  # a traceback ends with the error
    return Failure(code if code > 0 else PeerError.exit_code, f"{reason} (see {ended.log})")


def last_lines(log: Path) -> list[str]:
    """Last lines of a file without empty lines; an empty list if the file cannot be read."""
    with suppress(OSError), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL_BYTES, 0))
        text = file.read().decode("utf-8", errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()]
    return []


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until processes end; terminate those that run on, and kill those that do not react."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))
    for process in processes:
        process.terminate()  # no effect on an ended process
    for process in processes:
        _wait_or_kill(process)


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
