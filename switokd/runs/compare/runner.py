"""Runs the trials of a comparison, each as a `switokd train` of its own, some at a time.

Torch-free. The trials share the terminal's process group: Ctrl-C, or closing the terminal, reaches
them directly.

Not covered: several machines; giving trials that run at once a GPU each.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from switokd.errors import PeerError, UsageError
from switokd.runs.compare.trials import Trial, TrialState
from switokd.runtime.environment import cores
from switokd.runtime.lifecycle import Terminated

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
"""How long trials may take to end by themselves when the comparison is stopped."""

TAIL_BYTES = 4096


@dataclass(frozen=True)
class Failure:
    """How a trial ended that failed."""

    exit_code: int
    reason: str


@dataclass(frozen=True)
class Running:
    """A trial at work."""

    trial: Trial
    process: subprocess.Popen[bytes]
    log: Path
    started: float

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started


class Display(Protocol):
    """Who is told how it goes."""

    def started(self, trial: Trial) -> None:
        """A trial was started."""

    def update(self, running: Sequence[Running]) -> None:
        """Called several times a second."""

    def ended(self, trial: Trial, seconds: float, failure: Failure | None) -> None:
        """A trial ended, or (after 0 seconds) cannot be run."""


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Make and hold `out` for one comparison; yields the lock's descriptor, for its trials.

    They inherit it, so that the folder stays held while any of them lives on after the comparison
    itself was killed. UsageError if another one holds it, or it cannot be written.
    """
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
                f"--out: another comparison, or a run that one has left behind, is at work in "
                f"{out}; wait for it, or choose another folder"
            ) from None
        yield lock.fileno()


def clear_unfinished(trials: Iterable[Trial]) -> list[Trial]:
    """Remove what unfinished trials have left; return those trials.

    A finished trial, or one of another configuration (UsageError), is never touched.
    """
    cleared = []
    for trial in trials:
        if trial.state() is TrialState.UNFINISHED:
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
    """Run the trials, up to `jobs` at once; those that failed, by folder, in the order they ended.

    A trial waits for the one that trains its teachers if that is among them, and fails with it.
    """
    waiting, running = list(trials), list[Running]()
    failed: dict[Path, Failure] = {}
    try:
        while waiting or running:
            for each in [r for r in running if r.process.poll() is not None]:
                running.remove(each)
                failure = failure_of(each)
                if failure:
                    failed[each.trial.folder] = failure
                display.ended(each.trial, each.seconds, failure)
            for trial in _hopeless(waiting, failed):
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
    except Terminated:  # which the trials have not been sent, unlike Ctrl-C
        for each in running:
            each.process.terminate()
        raise
    finally:
        stop([each.process for each in running])
    return failed


def _hopeless(waiting: Sequence[Trial], failed: dict[Path, Failure]) -> list[Trial]:
    """Trials whose teachers have not been trained, which are added to `failed`."""
    found = [t for t in waiting if t.teachers_from in failed]
    for trial in found:
        assert trial.teachers_from is not None
        code = failed[trial.teachers_from].exit_code
        reason = f"not run, because {trial.teachers_from}, which trains its teachers, failed"
        failed[trial.folder] = Failure(code, reason)
    return found


def start(trial: Trial, jobs: int, logs: Path, lock: int) -> Running:
    """Start one trial; what it prints goes to a file in `logs`."""
    log = logs / f"{trial.folder.name}.log"
    command = [sys.executable, "-m", "switokd", "train", *trial.arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(['switokd', *command[3:]])}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**threads(trial, jobs), **os.environ, "PYTHONUNBUFFERED": "1"},
            pass_fds=(lock,),
        )
    return Running(trial, process, log, time.monotonic())


def threads(trial: Trial, jobs: int) -> Mapping[str, str]:
    """Share the cores among trials that run at once; alone, `switokd train` sees to it."""
    if jobs == 1:
        return {}
    ranks = jobs * (trial.config.world_size or 1)
    return {"OMP_NUM_THREADS": str(max(cores() // ranks, 1))}


def failure_of(ended: Running) -> Failure | None:
    """How an ended trial failed; None if it did not."""
    code = ended.process.returncode
    if code == 0:
        return None
    lines = last_lines(ended.log)
    complaints = [line.removeprefix("switokd: ") for line in lines if line.startswith("switokd: ")]
    reason = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
    words = complaints[:1] or lines[-1:]  # of a traceback, the error itself
    reason = ": ".join([reason, *words])
    return Failure(code if code > 0 else PeerError.exit_code, f"{reason} (see {ended.log})")


def last_lines(log: Path) -> list[str]:
    """The last few lines of a file, without empty ones; none if it cannot be read."""
    with suppress(OSError), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL_BYTES, 0))
        text = file.read().decode("utf-8", errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()]
    return []


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for processes that know that they are to end; end those that do not."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))
    for process in processes:
        process.terminate()  # nothing, if it has ended
    for process in processes:
        _see_it_end(process)


def _see_it_end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
