"""Statistics, table, CSV file and picture of a comparison, from made-up summaries.

Not covered: the trials (`test_trials.py`); real runs (`tests/cli/test_compare.py`).
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from switokd.errors import UsageError
from switokd.runs.compare.files import COLUMNS, csv_rows, save
from switokd.runs.compare.statistics import (
    Comparison,
    Statistic,
    TrialResult,
    read_summary,
)
from switokd.runs.compare.table import (
    duration,
    headings,
    markdown,
    rich_table,
    rows,
)


def summary(
    teacher: float, student: float, paused: int = 0, saved: float | None = 0.0, spent: float = 6.0
) -> dict[str, Any]:
    """Summary of a run of 40 steps, from the top-1 of its teacher and its student."""

    def network(role: str, parameters: int, top1: float, paused: int) -> dict[str, Any]:
        return {
            "role": role,
            "parameters": parameters,
            "steps": 40,
            "steps_paused": paused,
            "samples": 2560,
            "top1_last": top1,
            "top1_best": top1 + 1,
        }

    return {
        "wall_seconds": 30.0 + paused,
        "saved_by_pauses": {
            "wall_seconds": None,
            "device_seconds": saved,
            "teachers_device_seconds": spent,
        },
        "networks": {
            "large": network("teacher", 691386, teacher, paused),
            "small": network("student", 77562, student, 0),
        },
    }


RUNS = (
    TrialResult("vanilla", 0, summary(97.0, 90.0)),
    TrialResult("vanilla", 1, summary(98.0, 92.0)),
    TrialResult("switokd", 0, summary(96.0, 93.0, paused=10, saved=2.0)),
    TrialResult("switokd", 1, summary(96.5, 94.0, paused=20, saved=6.0, spent=2.0)),
    TrialResult("kd", 0, summary(97.0, 93.5, paused=40, saved=None, spent=0.0)),
    TrialResult("kd", 1, {}, "exit code 3: network small is not finite (see logs/kd-1.log)"),
    TrialResult("dml", 0, {}),
    TrialResult("dml", 1, {}),
)
MADE_UP = Comparison("made-up", RUNS)


def test_statistic_is_mean_and_sample_standard_deviation() -> None:
    assert Statistic.of([1.0, 2.0, 6.0]) == Statistic(3.0, 7**0.5, 3)
    assert str(Statistic.of([90.0, 92.0])) == "91.00 ± 1.41"
    assert Statistic.of([90.0]) == Statistic(90.0, None, 1)
    assert str(Statistic.of([90.0])) == "90.00"


def test_table_has_a_row_per_network_and_per_cost() -> None:
    networks, costs = rows(MADE_UP)
    assert headings(MADE_UP) == [
        "network", "role", "parameters", "vanilla", "switokd", "kd", "dml",
    ]  # fmt: skip
    assert [row.cells for row in networks] == [
        ("large", "teacher", "691,386", "97.50 ± 0.71", "96.25 ± 0.35", "97.00", "-"),
        ("small", "student", "77,562", "91.00 ± 1.41", "93.50 ± 0.71", "93.50", "-"),
    ]
    # Two strategies are equally good for the student. Teachers have no best strategy.
    assert [row.bold for row in networks] == [frozenset(), frozenset({4, 5})]
    assert {row.cells[0]: row.cells[3:] for row in costs} == {
        "teachers paused": ("0.0%", "37.5%", "100.0%", "-"),
        "wall time": ("30.0 s", "45.0 s", "70.0 s", "-"),
        "compute saved": ("0.0 s (0%)", "4.0 s (50%)", "-", "-"),
        "finished runs": ("2", "2", "1 of 2, 1 failed", "0 of 2"),
    }


def test_saving_has_no_share_if_a_run_did_not_record_the_cost() -> None:
    old = summary(96.0, 93.0, paused=10, saved=2.0)
    del old["saved_by_pauses"]["teachers_device_seconds"]
    comparison = Comparison("made-up", (TrialResult("switokd", 0, old), RUNS[2]))
    assert comparison.saved("switokd") == (2.0, None)
    assert comparison.saved("dml") is None


def test_markdown_marks_the_best_and_lists_failures_and_notes() -> None:
    text = markdown(MADE_UP, ["a note"])
    assert "| network | role | parameters | vanilla | switokd | kd | dml |" in text
    assert "| --- | --- | ---: | ---: | ---: | ---: | ---: |" in text
    assert (
        "| small | student | 77,562 | 91.00 ± 1.41 | **93.50 ± 0.71** | **93.50** | - |"
    ) in text
    assert "seeds 0, 1" in text
    assert "failed: kd, seed 1: exit code 3: network small is not finite" in text
    assert text.endswith("\n\na note\n")


def test_terminal_shows_the_table_with_the_best_in_bold() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=150, color_system="standard")
    console.print(
        rich_table(Comparison("made-up", (*RUNS, TrialResult("mine:Own[x]", 0, {}))), 200)
    )
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1m93.50 ± 0.71\x1b[0m" in shown
    assert "\x1b[1m96.25" not in shown
    assert "Own[x]" in shown  # not interpreted as markup


def test_csv_has_a_row_per_finished_run_and_network(tmp_path: Path) -> None:
    save(MADE_UP, tmp_path)
    with (tmp_path / "compare.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0][:9] == [
        "strategy", "seed", "network", "role", "top1_last", "top1_best", "steps", "steps_paused",
        "wall_seconds",
    ]  # fmt: skip
    assert len(lines) == 1 + 5 * 2
    switokd = lines.index(next(line for line in lines if line[:3] == ["switokd", "1", "large"]))
    assert lines[switokd] == [
        "switokd", "1", "large", "teacher", "96.5", "97.5", "40", "20", "50.0", "691386", "6.0",
        "2.0",
    ]  # fmt: skip
    assert all(tuple(row) == COLUMNS or set(row) == set(COLUMNS) for row in csv_rows(MADE_UP))


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.width, picture.height


def test_picture_grows_with_strategies_and_students(tmp_path: Path) -> None:
    save(MADE_UP, tmp_path)
    four_strategies = size_of(tmp_path / "compare.png")
    two_students = json.loads(json.dumps(summary(97.0, 90.0)))
    two_students["networks"]["other"] = two_students["networks"]["small"]
    save(Comparison("made-up", (TrialResult("vanilla", 0, two_students),)), tmp_path)
    one_strategy = size_of(tmp_path / "compare.png")
    assert one_strategy[0] > four_strategies[0]  # one student more
    assert one_strategy[1] < four_strategies[1]  # three strategies less


def test_unfinished_runs_have_no_summary(tmp_path: Path) -> None:
    assert read_summary(tmp_path / "nowhere") == {}
    for text in ("", '{"networks": {"a"', "[]", "{}"):
        (tmp_path / "summary.json").write_text(text)
        assert read_summary(tmp_path) == {}
    (tmp_path / "summary.json").write_text(json.dumps(summary(1.0, 2.0)))
    assert read_summary(tmp_path) == summary(1.0, 2.0)


def test_a_comparison_needs_a_finished_run() -> None:
    with pytest.raises(UsageError, match="no run is finished"):
        Comparison("made-up", (TrialResult("vanilla", 0, {}),))


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.25, "4.2 s"), (119.0, "119.0 s"), (150, "2.5 min"), (9000, "2.5 h")]
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_narrow_terminal_shows_strategies_as_rows() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
    console.print(rich_table(MADE_UP, 80))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    line = next(line for line in shown.splitlines() if " switokd " in line)
    assert line.index("96.25") < line.index("\x1b[1m93.50 ± 0.71\x1b[0m")
    assert "77,562" in shown
    assert "paused" in shown
