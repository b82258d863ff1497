"""The run folder: what a run leaves behind. Rank 0 alone writes it.

    config.yaml            the effective configuration
    signature.json         what the networks take and tell apart (`signature.py`)
    profiles/NxT.json      what placement: auto measured on N processes with T threads each
    decisions.jsonl        a line per step and pair
    metrics.jsonl          a line per epoch and network
    weights/NAME.pt        each network's last state dict; weights/NAME.ema.pt its moving average
    weights/best/NAME.pt   that of the epoch with its best test top-1
    weights/initial/       those before the first step, when asked for
    summary.json           written last
    curves.png             gap against threshold, accuracy (`curves.py`)

Not covered: checkpoints to resume from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switokd.config.config import Config
from switokd.data.signature import InputSignature
from switokd.distillation.decision import Decision, PairDecision
from switokd.errors import UsageError
from switokd.planning.profile import Profile
from switokd.runtime.environment import ProcessLayout


class RunFolder:
    """A new folder for one run's results. UsageError from every method if it cannot be written."""

    def __init__(self, config: Config) -> None:
        """Make the folder and write config.yaml. UsageError if it is there and not empty."""
        self.path = _make(config)
        with _writing(self.path):
            # "x": of two runs that start in the same empty folder, one fails here.
            try:
                with (self.path / "config.yaml").open("x", encoding="utf-8") as file:
                    file.write(config.dump())
            except FileExistsError:
                raise _taken(self.path) from None
            self._decisions = (self.path / "decisions.jsonl").open("a", encoding="utf-8")

    def save_signature(self, signature: InputSignature) -> None:
        """Write signature.json, so that a network can be used where its data set is not."""
        with _writing(self.path):
            signature.save(self.path / "signature.json")

    def save_profiles(self, profiles: Mapping[ProcessLayout, Profile]) -> None:
        """Write each to profiles/NxT.json, which auto.profiles may name."""
        for layout, profile in profiles.items():
            path = self.path / "profiles" / f"{layout.code}.json"
            with _writing(self.path):
                path.parent.mkdir(exist_ok=True)
            profile.save(path)

    def add_decision(self, decision: Decision) -> None:
        """Append one step's decision, a line per pair."""
        with _writing(self.path):
            for p in decision.pairs:
                self._decisions.write(json.dumps(_decision_line(decision.step, p)) + "\n")
            self._decisions.flush()

    def add_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Append one epoch's numbers, a line per network."""
        path = self.path / "metrics.jsonl"
        with _writing(self.path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def save_weights(self, states: Mapping[str, Mapping[str, Tensor]], folder: str) -> None:
        """Write each network's state dict to `folder`/NAME.pt; `torch.load` alone reads it.

        A file that is there already is replaced once the new one is whole.
        """
        with _writing(self.path):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
            for name, state in states.items():
                path = self.path / folder / f"{name}.pt"
                partial = path.with_suffix(".partial")
                whole = BytesIO()  # torch.save hides a full disk behind an error of its own
                torch.save(dict(state), whole)
                partial.write_bytes(whole.getbuffer())
                partial.replace(path)

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the record and write summary.json."""
        with _writing(self.path):
            self.close()
            (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Close the record; what is written stays."""
        self._decisions.close()

    def discard_if_unused(self) -> None:
        """Remove the folder of a run that ended before its first decision."""
        with suppress(OSError):
            self.close()
            if not (self.path / "decisions.jsonl").stat().st_size:
                shutil.rmtree(self.path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full disk and the like into one line."""
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


def check(config: Config) -> None:
    """UsageError if the run folder that the run file names cannot be used."""
    if config.run_dir is None:
        return
    path = Path(config.run_dir)
    if path.exists() and not path.is_dir():
        raise UsageError(f"run_dir: {path} is a file; name a folder that is new or empty")
    with _writing(path):
        is_taken = path.is_dir() and any(path.iterdir())
    if is_taken:
        raise _taken(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a .jsonl file; none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _make(config: Config) -> Path:
    if config.run_dir is not None:
        check(config)
        path = Path(config.run_dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"run_dir: {path} cannot be made: {error.strerror}") from None
        return path
    for number in count(1):
        path = Path("runs") / f"{config.name}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"{path} cannot be made: {error.strerror}; set run_dir") from None
        return path
    raise AssertionError("unreachable")


def _taken(path: Path) -> UsageError:
    return UsageError(
        f"run_dir: {path} holds a run already and is never overwritten; choose another folder, or "
        "remove that one first"
    )
