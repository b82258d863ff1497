"""`switokd compare`, started as by a user: small real runs, resumed, failed, interrupted.

Not covered: statistics and the choice of runs (`tests/runs/`).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner

from switokd.cli.main import app
from tests.support import BIN, process, run, wait_until

COMPARE = [str(BIN / "switokd"), "compare", "digits-1t1s"]
SMALL = [
    "schedule.max_steps=2",
    "placement=replicated",
    "coordinator=off",
    "networks.teacher.model=wrn-10-1",
    "--out=out",
]


def changed(folder: Path) -> dict[str, int]:
    """Return the time of the last change of each file, in nanoseconds."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def check_report(folder: Path) -> None:
    """Compare CSV, picture and table of vanilla, switokd and kd (one seed) with the runs."""
    with (folder / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["strategy"], row["network"]) for row in rows] == [
        (strategy, network)
        for strategy in ("vanilla", "switokd", "kd")
        for network in ("teacher", "student")
    ]
    for row in rows:
        summary = json.loads((folder / f"{row['strategy']}-0" / "summary.json").read_text())
        network = summary["networks"][row["network"]]
        assert float(row["top1_last"]) == network["top1_last"]
        assert float(row["wall_seconds"]) == summary["wall_seconds"]
        assert (row["seed"], row["steps"]) == ("0", "2")
        learned = float(row["teachers_device_seconds"])
        assert learned == 0 if row["strategy"] == "kd" else 0 < learned < summary["wall_seconds"]
    # kd has the teacher of vanilla, which is paused in every step.
    vanilla, kd = rows[0], rows[4]
    assert kd["top1_last"] == vanilla["top1_last"]
    assert (vanilla["steps_paused"], kd["steps_paused"]) == ("0", "2")
    with Image.open(folder / "compare.png") as picture:
        assert picture.width > 500
    table = (folder / "table.md").read_text()
    assert "| network | role | parameters | vanilla | switokd | kd |" in table
    assert "--strategies switokd,kd --seeds 0, --out out`" in table


@pytest.mark.timeout(300)
def test_comparison_is_trained_resumed_and_reported(tmp_path: Path) -> None:
    command = [*COMPARE, *SMALL, "--seeds=1", "--strategies=switokd,kd"]
    code, out, err = run(command, tmp_path, 200)
    assert (code, err) == (0, ""), out
    folder = tmp_path / "out"
    assert "kd: the teachers come from the vanilla run of the same seed" in out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("[")] == [
        "[1/3] vanilla, seed 0",
        "[2/3] switokd, seed 0",
        "[3/3] kd, seed 0",
    ]
    check_report(folder)

    # The same command again: only unfinished runs are trained, and the CSV does not change.
    before, saved = changed(folder), (folder / "compare.csv").read_text()
    (folder / "kd-0" / "summary.json").unlink()
    shutil.rmtree(folder / "kd-0" / "checkpoints")
    (folder / "kd-0" / "stale").touch()
    code, out, err = run(command, tmp_path, 200)
    assert (code, err) == (0, ""), out
    assert "out/kd-0 is unfinished: removed and trained again" in out
    assert "2 of 3 runs are finished already" in out
    after = changed(folder)
    for path, when in before.items():
        if "/vanilla-0/" in path or "/switokd-0/" in path:
            assert after[path] == when
    assert not (folder / "kd-0" / "stale").exists()
    assert (folder / "kd-0" / "summary.json").exists()

    # --report-only trains nothing and needs no list of strategies.
    now = (folder / "compare.csv").read_text()
    (folder / "compare.csv").unlink()
    code, out, err = run([*COMPARE, *SMALL, "--report-only"], tmp_path)
    assert (code, err) == (0, ""), out
    assert sorted((folder / "compare.csv").read_text().splitlines()) == sorted(now.splitlines())
    assert saved.splitlines()[:5] == now.splitlines()[:5]  # vanilla and switokd, to the digit

    # A run with another configuration is refused.
    code, out, err = run([*command, "data.batch_size=32"], tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "out/vanilla-0 holds a run with data.batch_size 64, and this comparison has 32" in err
    assert changed(folder / "vanilla-0") == {
        path: when for path, when in after.items() if "/vanilla-0/" in path
    }


OWN = """
from switokd.distillation.strategies.base import Strategy

class Fragile(Strategy):
    def __init__(self, rate):
        self.rate = rate

    def terms(self, network, couplings, decision):
        raise ValueError(f"no terms at rate {self.rate}")
"""


@pytest.mark.timeout(240)
def test_failed_run_does_not_stop_the_others_and_gives_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    arguments = ["--seeds=1", "--strategies=mine:Fragile:rate=2,dml", "--jobs=2"]
    code, out, _ = run([*COMPARE, *SMALL, *arguments], tmp_path, 200)
    assert code == 2, out
    log = Path("out") / "logs" / "mine-Fragile-rate=2-0.log"
    words = (
        "exit code 2: rank 0 (teacher, student): mine.py:9 in terms: "
        'ValueError: no terms at rate 2 (`raise ValueError(f"no terms at rate {self.rate}")`); '
        f"--verbose shows the frames (see {log})"
    )
    assert f"failed: mine:Fragile:rate=2, seed 0: {words}" in out
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| finished runs |  |  | 0 of 1, 1 failed | 1 |" in table
    assert words in table
    assert (tmp_path / "out" / "dml-0" / "summary.json").exists()
    assert "Traceback" not in (tmp_path / log).read_text()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_comparison_leaves_no_process(
    number: signal.Signals, expected: int, tmp_path: Path
) -> None:
    settings = ["schedule.epochs=500", *SMALL[1:], "--strategies=dml", "--seeds=2"]
    with process([*COMPARE, *settings], tmp_path, tmp_path / "log") as child:
        decision_log = tmp_path / "out" / "dml-0" / "decisions.jsonl"
        wait_until(
            lambda: decision_log.exists() and decision_log.stat().st_size, 100, "a first step"
        )
        runs = psutil.Process(child.pid).children(recursive=True)
        if number == signal.SIGINT:  # a terminal signals the whole process group
            os.killpg(child.pid, number)
        else:
            child.send_signal(number)
        assert child.wait(60) == expected
        _, alive = psutil.wait_procs(runs, timeout=10)
        assert alive == []
    words = (tmp_path / "log").read_text()
    assert words.splitlines()[-1].startswith("switokd: stopped; run the same command again")
    assert "Traceback" not in words
    assert not (tmp_path / "out" / "dml-1").exists()


@pytest.mark.timeout(240)
def test_a_killed_comparison_leaves_no_training_and_continues_it(tmp_path: Path) -> None:
    settings = [*SMALL, "schedule.max_steps=100", "checkpoint.every_steps=2"]
    settings += ["--strategies=dml", "--seeds=1"]
    folder = tmp_path / "out" / "dml-0"
    with process([*COMPARE, *settings], tmp_path, tmp_path / "log") as child:
        wait_until(lambda: any(folder.glob("checkpoints/step-*")), 100, "a checkpoint")
        runs = psutil.Process(child.pid).children(recursive=True)
        child.kill()
        _, alive = psutil.wait_procs(runs, timeout=30)
        assert alive == []
    assert not (folder / "summary.json").exists()
    code, out, err = run([*COMPARE, *settings], tmp_path, 100)
    assert (code, err) == (0, ""), out
    assert "out/dml-0 continues from its checkpoint" in out
    assert json.loads((folder / "summary.json").read_text())["restarts"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits-1t1z"], "did you mean 'digits-1t1s'"),
        (["digits-1t1s", "--strategies", "dlm"], "did you mean 'dml'"),
        (["digits-1t1s", "--strategies", ""], "strategy '' is not one of switokd, vanilla,"),
        (["digits-1t1s", "--seeds", ""], "--seeds : allowed are a number of seeds, like 3"),
        (["digits-1t1s", "--seeds", "some"], "--seeds some: allowed are a number of seeds, like 3"),
        (["digits-1t1s", "seed=3"], "seed=3: a comparison sets seed itself; use --seeds"),
        (["digits-1t1s", "--report-only"], "runs/compare-digits-1t1s holds no finished run"),
    ],
)
def test_mistake_gives_one_line_before_any_run(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 2
    assert words in result.output
    assert (result.output.startswith("switokd: "), result.output.count("\n")) == (True, 1)
    assert list(tmp_path.iterdir()) == []


def test_help_explains_arguments_of_strategies() -> None:
    result = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    shown = " ".join(result.output.split())
    assert "threshold:delta=0.5,kdcl-general:held_out=256,mine:Own:rate=2" in shown
    for option in ("--strategies", "--seeds", "--out", "--jobs", "--report-only"):
        assert option in shown
