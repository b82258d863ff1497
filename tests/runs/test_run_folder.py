"""Files of a run folder, numbering of folders, the picture and the closing table.

Not covered: the content that a real run writes (`tests/training/test_train.py`).
"""

from __future__ import annotations

import io
import json
import os
import struct
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from switokd.config.config import Config
from switokd.config.run_file import load
from switokd.distillation.decision import Rule, decide
from switokd.distillation.gap import Distances
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair
from switokd.errors import UsageError
from switokd.models.registry import build
from switokd.runs import resume
from switokd.runs.curves import draw_curves
from switokd.runs.json_lines import read_lines
from switokd.runs.run_dir import check_run_dir
from switokd.runs.run_folder import RunFolder
from switokd.runs.summary import print_table
from tests.support import lines

DISTANCES = {
    Pair("teacher1", "student"): Distances(0.8, 1.2, 1.0, 64),
    Pair("teacher2", "student"): Distances(0.1, 1.2, 1.0, 64),
}


def config(run_dir: Path | None) -> Config:
    settings = [] if run_dir is None else [f"run_dir={json.dumps(str(run_dir))}"]
    return load("digits-2t1s", settings)


def test_a_folder_contains_all_files_of_a_run(tmp_path: Path) -> None:
    given = config(tmp_path / "deep" / "out")
    folder = RunFolder(given)
    states = {"student": build("wrn-10-1", 1, 10).state_dict()}
    folder.weights.save(states, "weights/initial")
    folder.weights.save(states, "weights")
    folder.add_decision(decide(1, DISTANCES, Rule(make_strategy("switokd").switch)))
    folder.add_metrics([{"epoch": 1, "network": "student"}])
    folder.add_metrics([{"epoch": 2, "network": "student"}])
    folder.finish({"name": "digits-2t1s"})
    assert folder.path == tmp_path / "deep" / "out"
    assert {str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file()} == {
        "attempts.jsonl",
        "config.yaml",
        "decisions.jsonl",
        "metrics.jsonl",
        "summary.json",
        "weights/initial/SHA256SUMS",
        "weights/initial/student.pt",
        "weights/SHA256SUMS",
        "weights/student.pt",
    }
    assert load(str(folder.path / "config.yaml")) == given
    assert [line["epoch"] for line in lines(folder.path / "metrics.jsonl")] == [1, 2]
    assert json.loads((folder.path / "summary.json").read_text()) == {"name": "digits-2t1s"}


def test_a_decision_is_on_disk_immediately_with_a_line_per_pair(tmp_path: Path) -> None:
    folder = RunFolder(config(tmp_path))
    decision = decide(3, DISTANCES, Rule(make_strategy("switokd").switch))
    folder.add_decision(decision)
    one, two = lines(tmp_path / "decisions.jsonl")  # the file is still open
    assert one == {
        "step": 3,
        "teacher": "teacher1",
        "student": "student",
        "gap": 0.8,
        "e_s": 1.2,
        "e_t": 1.0,
        "epsilon": decision.pairs[0].epsilon,
        "delta": decision.pairs[0].delta,
        "mode": "expert",
        "n": 64,
    }
    assert (two["teacher"], two["mode"]) == ("teacher2", "learning")
    folder.add_decision(decide(4, DISTANCES, Rule(make_strategy("switokd").switch)))
    folder.close()
    assert [d["step"] for d in read_lines(tmp_path / "decisions.jsonl")] == [3, 3, 4, 4]


def test_weights_load_safely_and_fit_the_network(tmp_path: Path) -> None:
    network = build("wrn-10-1", 1, 10)
    folder = RunFolder(config(tmp_path))
    folder.weights.save({"student": network.state_dict()}, "weights")
    folder.close()
    state = torch.load(tmp_path / "weights/student.pt", weights_only=True)
    assert type(state) is dict
    other = build("wrn-10-1", 1, 10)
    other.load_state_dict(state)
    assert all(map(torch.equal, other.state_dict().values(), network.state_dict().values()))


def test_better_weights_replace_the_previous_weights(tmp_path: Path) -> None:
    folder = RunFolder(config(tmp_path))
    for value in (1.0, 2.0):
        folder.weights.save({"student": {"w": torch.tensor(value)}}, "weights/best")
    folder.close()
    file = tmp_path / "weights/best/student.pt"
    assert set(file.parent.iterdir()) == {file, file.parent / "SHA256SUMS"}  # no partial file
    assert torch.load(file, weights_only=True) == {"w": torch.tensor(2.0)}


def test_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for refuse in (check_run_dir, RunFolder):
        with pytest.raises(UsageError, match="is not empty, and a run never overwrites files"):
            refuse(config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_second_run_in_the_same_empty_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both runs have checked the folder while it was empty.
    monkeypatch.setattr("switokd.runs.run_dir.check_run_dir", lambda config: None)
    first = RunFolder(config(tmp_path))
    with pytest.raises(UsageError, match="is not empty"):
        RunFolder(config(tmp_path))
    first.close()
    assert load(str(tmp_path / "config.yaml")) == config(tmp_path)


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="is a file; choose a new or an empty folder"):
        check_run_dir(config(file))
    for refuse in (check_run_dir, RunFolder):
        for below in ("below", "below/it"):
            with pytest.raises(UsageError, match=f"cannot be created: {file} is a file; name ano"):
                refuse(config(file / below))


def test_a_folder_that_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o555)
    if os.geteuid() == 0:  # who may write everywhere
        monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path or mode == os.F_OK)
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(UsageError, match=f"you may not write in {tmp_path}; name another fo"):
            check_run_dir(config(folder))


def test_a_file_named_runs_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()
    for refuse in (check_run_dir, RunFolder):
        with pytest.raises(UsageError, match=r"can be made: .*/runs is a file; set run_dir"):
            refuse(config(None))


def test_folder_whose_name_is_too_long_is_refused(tmp_path: Path) -> None:
    for settings in ({}, {"resume": "auto"}):
        long = config(tmp_path / ("a" * 300)).model_copy(update=settings)
        assert resume.find(long) is None
        with pytest.raises(UsageError, match=r"^run_dir: .* cannot be .*: File name too long"):
            RunFolder(long)


def test_folder_that_is_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    for target in ("nowhere", "link"):  # the second leads to itself
        link.symlink_to(target)
        with pytest.raises(UsageError, match=f"is a link to {target}, which does not exist; "):
            check_run_dir(config(link))
        link.unlink()


def test_unnamed_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_run_dir(config(None))
    folders = [RunFolder(config(None)) for _ in range(3)]
    for folder in folders:
        folder.close()
    names = [f"runs/digits-2t1s-00{n}" for n in (1, 2, 3)]
    assert [str(folder.path) for folder in folders] == names
    assert all((tmp_path / name / "config.yaml").is_file() for name in names)


def write_logs(folder: Path, pairs: int, steps: int, epochs: int, every: int = 1) -> None:
    decisions = [
        {"step": step, "teacher": f"t{p}", "student": "s", "gap": 0.2 + step / 99, "delta": 0.4}
        | {"mode": "expert" if step % 3 else "learning"}
        for step, p in product(range(1, steps + 1), range(pairs))
    ]
    metrics: list[dict[str, Any]] = [
        {"step": steps * e // epochs, "network": name, "role": role}
        | {"test_top1": None if e % every else 90.0 + e}
        for e in range(1, epochs + 1)
        for name, role in (("t0", "teacher"), ("s", "student"))
    ]
    for name, log in (("decisions", decisions), ("metrics", metrics)):
        text = "".join(json.dumps(line) + "\n" for line in log)
        (folder / f"{name}.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("pairs", "steps", "epochs", "every"),
    [(1, 60, 3, 1), (2, 60, 3, 2), (2, 1, 1, 1), (2, 9, 1, 2), (1, 1, 0, 1), (2, 30, 0, 1)],
)
def test_curves(tmp_path: Path, pairs: int, steps: int, epochs: int, every: int) -> None:
    write_logs(tmp_path, pairs, steps, epochs, every)
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert (width, height) == pytest.approx((11 * 120, 2.4 * (pairs + 1) * 120), abs=1)
    assert 10_000 < len(picture) < 500_000


NO_RESTART = {
    "restarts": 0,
    "steps_lost": 0,
    "seconds_lost": 0.0,
    "seconds_since_first_start": 40.0,
    "effective_training_ratio": 0.75,
}


def test_table_has_a_row_per_network() -> None:
    network = {"parameters": 83_700, "top1_last": 97.216, "top1_best": 98.0, "steps": 200}
    summary = {
        "name": "demo",
        "topology": "1T1S",
        "strategy": "switokd",
        "training_seconds": 30.0,
        "saved_by_pauses": {"wall_seconds": 10.0, "device_seconds": 12.34},
        "waiting": {"decision_mean_seconds": 0.0015, "decision_p99_seconds": 0.004},
        **NO_RESTART,
        "networks": {
            "big": {**network, "role": "teacher", "steps_paused": 50},
            "little": {**network, "role": "student", "steps_paused": 0},
        },
    }
    out = io.StringIO()
    print_table(Console(file=out, width=100), summary)
    rows = [line.replace("│", " ").split() for line in out.getvalue().splitlines()]
    assert ["big", "teacher", "83,700", "97.22", "%", "98.00", "%", "25%"] in rows
    assert ["little", "student", "83,700", "97.22", "%", "98.00", "%", "-"] in rows
    shown = " ".join(out.getvalue().split())
    assert "saved 12.3 device-seconds" in shown
    assert "about 10.0 s (25%) of the training time" in shown
    assert "waited for decisions 1.50 ms per step on average, 1.0% of the training time" in shown
    assert "no restart; 75% of the 40.0 s since the start went into steps" in shown
    no_savings = {"wall_seconds": None, "device_seconds": 0.0}
    print_table(Console(file=out, width=100), {**summary, "saved_by_pauses": no_savings})
    assert out.getvalue().count("saved") == 1


def test_table_shows_moving_averages_if_a_network_has_one() -> None:
    network = {"parameters": 9, "top1_last": 97.0, "top1_best": 98.0, "steps": 2}
    summary = {
        "name": "demo",
        "topology": "1T1S",
        "strategy": "kd",
        "training_seconds": 30.0,
        "saved_by_pauses": {"wall_seconds": None, "device_seconds": 0.0},
        "waiting": {"decision_mean_seconds": 0.0, "decision_p99_seconds": 0.0},
        **NO_RESTART,
        "networks": {
            "frozen": {**network, "role": "teacher", "steps_paused": 2}
            | {"top1_ema_last": None, "top1_ema_best": None},
            "little": {**network, "role": "student", "steps_paused": 0}
            | {"top1_ema_last": 97.5, "top1_ema_best": 98.5},
        },
    }
    out = io.StringIO()
    print_table(Console(file=out, width=100), summary)
    rows = [line.replace("│", " ").split() for line in out.getvalue().splitlines()]
    assert ["frozen", "teacher", "9", "97.00", "%", "98.00", "%", "-", "100%"] in rows
    shown = ["little", "student", "9", "97.00", "%", "98.00", "%", "97.50", "%", "-"]
    assert shown in rows


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step"')
    assert read_lines(tmp_path / "d.jsonl") == [{"step": 1}, {"step": 2}]
