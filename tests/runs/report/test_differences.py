"""Which settings a report names: those that are not defaults, and those that differ."""

from __future__ import annotations

from switokd.config.run_file import load
from switokd.runs.report.differences import between, changed


def test_settings_that_differ() -> None:
    runs = [load("digits-1t1s"), load("digits-1t1s", ["seed=3", "schedule.epochs=7"])]
    assert between(runs) == ["seed", "schedule.epochs"]
    assert between(runs[:1]) == []


def test_of_a_network_that_not_all_runs_have_only_what_is_no_default() -> None:
    settings = ["networks.teacher.clip_norm=1.5", "networks.student.model=wrn-10-1"]
    runs = [load("digits-1t1s", settings), load("digits-2t1s", settings[1:])]
    found = between(runs)
    assert "networks.teacher.clip_norm" in found
    assert "networks.teacher2.model" in found
    for key in found:
        assert any(key in changed(run) for run in runs), f"{key} has its default in all runs"
    missing = {"networks.teacher.ema_decay", "networks.teacher2.weights"}
    assert not missing & set(found)
