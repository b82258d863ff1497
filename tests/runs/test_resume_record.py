"""Where an interrupted run continues, and what is cut from its record.

Not covered: that it continues in the same bits (`tests/training/test_resume.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from switokd.config.config import Config
from switokd.config.run_file import load
from switokd.errors import UsageError
from switokd.runs import resume
from switokd.runs.checkpoints import stored, write
from switokd.runs.run_dir import check_run_dir
from switokd.runs.run_folder import RunFolder

TEACHERS = ("teacher1", "teacher2")


def configured(folder: Path, *settings: str) -> Config:
    return load("digits-2t1s", [f"run_dir={folder}", "resume=auto", *settings])


def interrupted(folder: Path, steps: int, checkpoints: tuple[int, ...]) -> None:
    """Make the folder of a run that was killed after `steps`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(load("digits-2t1s", [f"run_dir={folder}"]).dump())
    for step in checkpoints:
        write(folder, step, {"step": step}, {"step": step})
    modes = {1: ("expert", "learning"), 2: ("expert", "expert")}
    record = [
        {"step": step, "teacher": t, "student": "student", "mode": mode}
        for step in range(1, steps + 1)
        for t, mode in zip(TEACHERS, modes.get(step, ("learning", "learning")), strict=True)
    ]
    (folder / "decisions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in record))
    epochs = [{"epoch": epoch, "step": 22 * epoch} for epoch in range(1, steps // 22 + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_folder_is_a_new_run(tmp_path: Path) -> None:
    assert resume.find(configured(tmp_path / "new")) is None
    assert resume.find(load("digits-2t1s", [f"run_dir={tmp_path}"])) is None


def test_the_newest_checkpoint_is_used(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", 50, (20, 40))
    found = resume.find(configured(tmp_path / "run"))
    assert found is not None
    assert (found.step, found.state, list(found.notes)) == (40, {"step": 40}, [])
    assert found.describe(440) == [f"continuing {tmp_path / 'run'} after step 40 of 440"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", 50, (20, 40))
    (tmp_path / "run/checkpoints/step-000000040/state.pt").write_bytes(b"torn")
    found = resume.find(configured(tmp_path / "run"))
    assert found is not None
    assert found.step == 20
    (note,) = found.notes
    assert "step-000000040 is not used: " in note
    assert "state.pt is damaged" in note


def test_a_checkpoint_whose_record_is_lost_is_not_used(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", 30, (20, 40))
    found = resume.find(configured(tmp_path / "run"))
    assert found is not None
    assert found.step == 20
    assert "the record ends at step 30" in found.notes[0]


def test_without_a_checkpoint_the_run_starts_again_in_its_folder(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", 7, ())
    config = configured(tmp_path / "run")
    check_run_dir(config)
    found = resume.find(config)
    assert found is not None
    folder = RunFolder(config, found)
    folder.begin()
    folder.close()
    assert (tmp_path / "run/decisions.jsonl").read_text() == ""
    assert "has no checkpoint" in found.describe(440)[0]


@pytest.mark.parametrize(("step", "epochs"), [(40, 1), (44, 1), (45, 2)])
def test_the_record_is_cut_back(step: int, epochs: int, tmp_path: Path) -> None:
    """Metrics of an epoch that ends at the checkpoint's step are evaluated again."""
    run = tmp_path / "run"
    interrupted(run, 50, (step,))
    for name in ("summary.json", "curves.png"):
        (run / name).write_text("of a finished run")
    with (run / "decisions.jsonl").open("a") as file:
        file.write('{"step": 51, "teac')
    resume.cut(run, step)
    assert [line["step"] for line in lines(run / "decisions.jsonl")][-3:] == [step - 1, step, step]
    assert len(lines(run / "decisions.jsonl")) == 2 * step
    assert len(lines(run / "metrics.jsonl")) == epochs
    assert not (run / "summary.json").exists()
    assert not (run / "curves.png").exists()
    assert resume.paused_by_step(run, 20)[1] == ["teacher1"]
    assert resume.paused_by_step(run, 20)[2] == ["teacher1", "teacher2"]
    assert list(resume.paused_by_step(run, 20)) == list(range(1, 21))


def test_a_checkpoint_behind_the_cut_is_removed(tmp_path: Path) -> None:
    """It is damaged, and would push good ones out."""
    interrupted(tmp_path / "run", 50, (20, 40))
    resume.cut(tmp_path / "run", 20)
    assert [checkpoint.step for checkpoint in stored(tmp_path / "run")] == [20]


def test_a_finished_run_without_a_usable_checkpoint_is_not_removed(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", 50, ())
    (tmp_path / "run/summary.json").write_text("{}")
    words = "is complete and has no checkpoint that can be used"
    with pytest.raises(UsageError, match=words):
        resume.find(configured(tmp_path / "run"))


def test_a_record_whose_checkpoints_are_all_damaged_is_kept_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (1, 2):
        interrupted(run, 50, (40,))
        (run / "checkpoints/step-000000040/state.pt").write_bytes(b"torn")
        before = (run / "decisions.jsonl").read_bytes()
        found = resume.find(configured(run))
        assert found is not None
        said = "; ".join(found.describe(440))
        assert "state.pt is damaged" in said
        assert f"the record of 50 steps is kept in {run}/set-aside-{number}" in said
        assert "starting from the first step" in said
        assert (run / "decisions.jsonl").read_bytes() == before  # until the first step follows
        resume.cut(run, found.step)
        assert (run / "decisions.jsonl").read_bytes() == b""
        assert not stored(run)
        aside = run / f"set-aside-{number}"
        assert (aside / "decisions.jsonl").read_bytes() == before
        assert (aside / "step-000000040/state.pt").read_bytes() == b"torn"


def test_a_start_that_fails_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(run, 50, (40,))
    (run / "summary.json").write_text("of a finished run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config = configured(run)
    RunFolder(config, resume.find(config)).close()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.batch_size=32", "data.batch_size (64 there, 32 now)"),
        ("seed=3", "seed (0 there, 3 now)"),
        ("networks.student.optimizer.lr=0.5", "networks.student.optimizer.lr ("),
        ("schedule.accumulate=2", "schedule.accumulate (1 there, 2 now)"),
    ],
)
def test_other_settings_are_refused_by_name(setting: str, words: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "run", 50, (40,))
    with pytest.raises(UsageError) as caught:
        resume.find(configured(tmp_path / "run", setting))
    assert words in str(caught.value)
    assert "These may change: placement" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(lines(tmp_path / "run/decisions.jsonl")) == 100, "nothing was cut"


@pytest.mark.parametrize(
    "setting",
    ["placement=replicated", "schedule.epochs=30", "checkpoint.keep=5", "coordinator.timeout=9.0"],
)
def test_settings_that_may_change(setting: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "run", 50, (40,))
    found = resume.find(configured(tmp_path / "run", setting))
    assert found is not None
    key, _, value = setting.partition("=")
    is_told = key.startswith(("schedule", "placement"))
    assert any(key in note and value in note for note in found.notes) == is_told


def test_two_processes_cannot_continue_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switokd.runs.run_folder.LOCK_SECONDS", 0.1)
    interrupted(tmp_path / "run", 50, (40,))
    config = configured(tmp_path / "run")
    found = resume.find(config)
    first = RunFolder(config, found)
    with pytest.raises(UsageError, match="another process trains in"):
        RunFolder(config, found)
    first.close()
    RunFolder(config, found).close()
    assert stored(tmp_path / "run")


def test_resume_needs_a_folder() -> None:
    with pytest.raises(UsageError, match="resume: auto needs run_dir"):
        load("digits-2t1s", ["resume=auto"])
