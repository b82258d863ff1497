"""Warnings of a run are in its folder and in its report, whichever rank has said them.

Not covered: what the warnings are about (`training/test_input_guard.py`, `data/test_loader.py`).
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import switokd
from switokd.config.run_file import load
from switokd.runs.report.events import Event, events
from switokd.runs.report.record import read_runs
from switokd.runtime.kept_warnings import MOST, WARNINGS, WarningKeeper
from tests.preloaded import train
from tests.support import lines

NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, in_channels, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, x):
        return super().forward(x.mul_(0.5))
"""
OBSERVER = """
import switokd

class Broken(switokd.Observer):
    def on_step(self, step, epoch, result):
        raise ValueError("of no use")
"""


def warnings_of(folder: Path) -> list[Event]:
    (run,) = read_runs([folder])
    return [event for event in events(run) if event.text.startswith("warning")]


def test_a_warning_of_another_rank_is_in_the_folder_and_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "inplace.py").write_text(NETWORK)
    own = ("networks.student.model=inplace:Net", "schedule.max_steps=3")
    folder = train(tmp_path, 2, "digits-1t1s", *own)
    (kept,) = [w for w in lines(folder / "warnings.jsonl") if "in place" in w["text"]]
    assert (kept["rank"], kept["step"]) == (1, 1)
    assert kept["text"].startswith("network student changes its input in place")
    (event,) = [event for event in warnings_of(folder) if "in place" in event.text]
    assert event == Event(1, f"warning of rank 1: {kept['text']}")


def test_a_warning_of_rank_0_is_kept_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(OBSERVER)
    run = switokd.train(
        "digits-1t1s",
        {
            "run_dir": tmp_path / "out",
            "schedule.max_steps": 2,
            "observers": ["broken:Broken"],
            "import_from": [str(tmp_path)],
        },
    )
    (event,) = warnings_of(run.path)
    assert event.step == 1
    assert event.text.startswith("warning: ")
    assert "(observer broken:Broken in on_step): ValueError: of no use" in event.text
    WARNINGS.note("after the run")
    assert len(lines(run.path / "warnings.jsonl")) == 1
    WARNINGS.begin(0)


def test_warnings_wait_until_they_can_be_written() -> None:
    keeper, written = WarningKeeper(), list[dict[str, object]]()
    keeper.note("of an earlier run")
    keeper.begin(3)
    keeper.note("one")
    assert [w["text"] for w in keeper.take()] == ["one"]
    keeper.note("two")
    keeper.write_with(written.append)
    keeper.note("three")
    assert [(w["text"], w["rank"]) for w in written] == [("two", 3), ("three", 3)]
    keeper.write_with(None)
    threads = [threading.Thread(target=keeper.note, args=(str(i),)) for i in range(MOST + 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keeper.take()) == MOST


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run that has just begun."""
    (tmp_path / "config.yaml").write_text(load("digits-1t1s").dump())
    return tmp_path


def test_the_same_warning_is_one_event(folder: Path) -> None:
    (folder / "warnings.jsonl").write_text(
        '{"time": 1.0, "rank": 0, "step": 4, "text": "a"}\n'
        '{"time": 2.0, "rank": 2, "step": 9, "text": "a"}\n'
        '{"text": "from a later version", "more": 1}\n'
        '{"time": 3.0, "ra'
    )
    assert warnings_of(folder) == [
        Event(None, "warning: from a later version"),
        Event(4, "warning of rank 0, 2 (2 times): a"),
    ]


def test_a_report_does_not_list_warnings_without_end(folder: Path) -> None:
    text = "".join(f'{{"rank": 0, "step": 1, "text": "w{i}"}}\n' for i in range(103))
    (folder / "warnings.jsonl").write_text(text)
    (run,) = read_runs([folder])
    texts = [event.text for event in events(run)]
    assert "3 other warnings, see warnings.jsonl" in texts
    assert "warning: w99" in texts
    assert "warning: w100" not in texts
