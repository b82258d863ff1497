"""A user's own strategy, given by import string, from a folder outside the repository.

With real processes: the ranks and the coordinator import the strategy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from switokd.cli.main import app
from tests.preloaded import call, switokd_command, train_ranks
from tests.support import lines, process

STRATEGY = """
import collections

from switokd.distillation.decision import Mode
from switokd.distillation.strategies.base import Strategy


class Ahead(Strategy):
    pauses = True

    def __init__(self, factor):
        if factor <= 0:
            raise ValueError(f"factor must be above 0, got {factor}")
        self.factor = factor

    def switch(self, d, delta):
        return Mode.EXPERT if d.e_t < self.factor * d.e_s else Mode.LEARNING

    def terms(self, network, couplings, decision):
        return couplings.terms(network, [n for n in couplings.topology if n != network])


not_a_strategy = collections.Counter
"""
RUN_FILE = """
name: mine
topology: 1T1S
teacher: {model: wrn-10-1}
student: {model: wrn-10-1, optimizer: {lr: 0.03}}
distillation: {strategy: "mine:Ahead", strategy_kwargs: {factor: 0.99}}
schedule: {max_steps: 15}
run_dir: out
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    """A run file with its strategy beside it; the run starts in another folder."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "mine.py").write_text(STRATEGY)
    (project / "mine.yaml").write_text(RUN_FILE)
    return str(project / "mine.yaml")


def check_decisions(folder: Path) -> None:
    """Check that decisions.jsonl follows the strategy's rule, and that pauses follow decisions."""
    decisions = lines(folder / "decisions.jsonl")
    assert len(decisions) == 15
    modes = ["expert" if d["e_t"] < 0.99 * d["e_s"] else "learning" for d in decisions]
    assert [d["mode"] for d in decisions] == modes
    assert set(modes) == {"expert", "learning"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["strategy"] == "mine:Ahead"
    assert summary["networks"]["teacher"]["steps_paused"] == modes.count("expert")


def test_the_coordinator_in_rank_0_imports_the_strategy(run_file: str, tmp_path: Path) -> None:
    code, out, err = call(tmp_path, train_ranks, 2, (run_file,))
    assert code == 0, err
    assert "2 processes on cpu, status page http://" in out
    check_decisions(tmp_path / "out")


def test_a_separate_coordinator_refuses_strategies_it_was_not_started_with(
    run_file: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "switokd", "coordinator", "--port", "0", "--http-port", "0"]
    with process(command, Path(run_file).parent) as coordinator:
        assert coordinator.stdout is not None
        address = json.loads(coordinator.stdout.readline())["grpc"]
        words = (run_file, f"coordinator.address={address}")
        code, _, err = call(tmp_path, train_ranks, 2, words)
        assert coordinator.poll() is None
    assert code == 2, err
    (line,) = err.splitlines()
    assert line == (
        f"switokd: the coordinator at {address} refuses the run: strategy mine:Ahead is not one "
        "that this coordinator may import: start it with --strategy mine:Ahead"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("strategy=mine:Behind", "'Behind' is not there in module mine"),
        ("strategy=yours:Ahead", "there is no module 'yours'"),
        (
            "strategy=mine:not_a_strategy",
            "must be a switokd.distillation.strategies.Strategy, got Counter",
        ),
        ("strategy_kwargs={}", "missing 1 required positional argument: 'factor'"),
        ("strategy_kwargs={factor: -1}", "factor must be above 0, got -1"),
    ],
)
def test_a_mistake_is_one_line_before_any_process_starts(
    setting: str, words: str, run_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        "switokd.runtime.launcher.launch", lambda *_: pytest.fail("ranks were started")
    )
    sys.modules.pop("mine", None)
    result = CliRunner().invoke(app, ["train", run_file, f"distillation.{setting}"])
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("switokd: ")
    assert words in line


def test_a_coordinator_does_not_start_with_a_missing_strategy(tmp_path: Path) -> None:
    words = ("coordinator", "--strategy", "mine:Ahead")
    code, out, err = call(tmp_path, switokd_command, *words)
    assert (code, out) == (2, "")
    assert err.splitlines() == [err.strip()]
    assert "--strategy mine:Ahead: there is no module 'mine'" in err
