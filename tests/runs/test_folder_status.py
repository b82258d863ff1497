"""The status of a run folder without a coordinator: states, shares, long and damaged records.

Not covered: the folder of a real run (`tests/cli/test_operate.py`).
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from switokd.errors import UsageError
from switokd.runs import folder_status as module
from switokd.runs.folder_status import folder_status, identity_of, is_run_folder

CONFIG = """
distillation: {strategy: switokd}
networks: {t: {role: teacher}, s: {role: student}}
"""


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def decision(step: int) -> dict[str, Any]:
    mode = "expert" if step % 4 == 0 else "learning"
    return {"step": step, "teacher": "t", "student": "s", "gap": 0.5, "delta": 0.25, "mode": mode}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "run.json").write_text('{"run_id": "mine-1", "epoch": 2, "coordinator": "a:1"}')
    write_lines(tmp_path / "attempts.jsonl", [{"started": 100.0}, {"finished": 160.0, "step": 8}])
    write_lines(tmp_path / "decisions.jsonl", map(decision, range(1, 9)))
    line = {"network": "t", "loss": 0.5, "train_top1": 50.0, "test_top1": 25.0}
    write_lines(tmp_path / "metrics.jsonl", [line])
    of_t = {"role": "teacher", "steps": 8, "steps_paused": 2, "samples": 64}
    (tmp_path / "summary.json").write_text(json.dumps({"networks": {"t": of_t}}))
    return tmp_path


def test_a_finished_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert is_run_folder(folder)
    assert not is_run_folder(tmp_path_factory.mktemp("empty"))
    view = folder_status(folder)
    assert (view["run_id"], view["state"], view["epoch"]) == ("mine-1", "finished", 2)
    assert (view["started_at"], view["ended_at"], view["last_step"]) == (100.0, 160.0, 8)
    assert view["planned_steps"] == 8
    (pair,) = view["pairs"]
    assert (pair["expert_ratio"], pair["switches"], pair["mode"]) == (0.25, 3, "expert")
    assert pair["margin"] == 0.25
    teacher, student = view["networks"]
    assert (teacher["is_paused"], teacher["paused_ratio"]) == (True, 0.25)
    assert (teacher["accuracy"], teacher["test_accuracy"]) == (0.5, 0.25)
    assert (student["role"], student["is_paused"], student["loss"]) == ("student", None, None)


def test_a_run_without_a_summary_goes_on_or_was_interrupted(folder: Path) -> None:
    (folder / "summary.json").unlink()
    view = folder_status(folder)
    assert view["state"] == "interrupted"
    assert view["ended_at"] == (folder / "decisions.jsonl").stat().st_mtime
    with (folder / "config.yaml").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        view = folder_status(folder)
    assert (view["state"], view["ended_at"]) == ("training", None)


def test_how_far_an_interrupted_run_is(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_text("schedule: {epochs: 5}\n")
    lines = [{"epoch": 1, "step": 3, "network": "s"}, {"epoch": 2, "step": 6, "network": "s"}]
    write_lines(folder / "metrics.jsonl", lines)
    view = folder_status(folder)
    assert (view["last_step"], view["planned_steps"], view["training_epoch"]) == (8, 15, 3)
    write_lines(folder / "metrics.jsonl", [*lines, {"epoch": 3, "step": 8, "network": "s"}])
    assert folder_status(folder)["planned_steps"] is None  # epochs of different lengths


def test_a_long_record_is_read_from_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(folder / "decisions.jsonl", map(decision, range(1, 1001)))
    monkeypatch.setattr(module, "MOST_BYTES", 50_000)
    view = folder_status(folder)
    (pair,) = view["pairs"]
    assert (view["last_step"], pair["mode"]) == (1000, "expert")
    assert (pair["expert_ratio"], pair["switches"]) == (None, None)


@pytest.mark.parametrize("name", ["summary.json", "decisions.jsonl", "attempts.jsonl"])
def test_a_damaged_file_is_one_sentence(name: str, folder: Path) -> None:
    (folder / name).write_text("no json\n")
    with pytest.raises(UsageError, match="this run folder is damaged"):
        folder_status(folder)


def test_a_damaged_identity_is_none(folder: Path) -> None:
    (folder / "run.json").write_text("[")
    assert identity_of(folder) == {}
    assert folder_status(folder)["run_id"] is None
