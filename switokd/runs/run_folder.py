"""The run folder: files that a run leaves behind. Only rank 0 writes them.

    config.yaml            the effective configuration
    signature.json         input format of the networks, and the classes (`data/signature.py`)
    profiles/NxT.json      measurements of placement: auto on N processes with T threads
    decisions.jsonl        the decision log: one line per step and pair
    metrics.jsonl          one line per epoch and network
    weights/NAME.pt        state dict of a network after the last step
    weights/NAME.ema.pt    moving average of the weights
    weights/best/NAME.pt   state dict of the epoch with the best test top-1
    weights/initial/       state dicts before the first step, if requested
    summary.json           written last
    curves.png             gap, threshold and accuracy (`curves.py`)

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
    """Folder of a new run. Every method raises UsageError if the folder cannot be written."""

    def __init__(self, config: Config) -> None:
        """Create the folder and write config.yaml. UsageError if the folder is not empty."""
        self.path = _make(config)
        with _writing(self.path):
            # Mode "x": if two runs start in the same empty folder, one of them fails here.
            try:
                with (self.path / "config.yaml").open("x", encoding="utf-8") as file:
                    file.write(config.dump())
            except FileExistsError:
                raise _taken(self.path) from None
            self._decisions = (self.path / "decisions.jsonl").open("a", encoding="utf-8")

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

    def add_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Append the numbers of one epoch to metrics.jsonl, one line per network."""
        path = self.path / "metrics.jsonl"
        with _writing(self.path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def save_weights(self, states: Mapping[str, Mapping[str, Tensor]], folder: str) -> None:
        """Write the state dict of each network to `folder`/NAME.pt, for `torch.load`.

        states: state dicts by network. An existing file is replaced after the new file is complete.
        """
        with _writing(self.path):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
            for name, state in states.items():
                path = self.path / folder / f"{name}.pt"
                partial = path.with_suffix(".partial")
                buffer = BytesIO()  # torch.save to a file would hide the OSError of a full disk
                torch.save(dict(state), buffer)
                partial.write_bytes(buffer.getbuffer())
                partial.replace(path)

    def finish(self, summary: dict[str, Any]) -> None:
        """Close decisions.jsonl and write summary.json."""
        with _writing(self.path):
            self.close()
            (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Close decisions.jsonl; its lines stay."""
        self._decisions.close()

    def discard_if_unused(self) -> None:
        """Remove the folder if the run ended before its first decision."""
        with suppress(OSError):
            self.close()
            if not (self.path / "decisions.jsonl").stat().st_size:
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


def check_run_dir(config: Config) -> None:
    """UsageError if the setting `run_dir` names a file or a folder that is not empty."""
    if config.run_dir is None:
        return
    path = Path(config.run_dir)
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
