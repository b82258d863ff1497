"""Lines survive a disk that is full for a while, each exactly once and whole.

Not covered: a real full disk (`tests/faults/test_namespaces.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from switokd.runs import record_file
from switokd.runs.record_file import RecordFile
from tests.runtime.test_durable import disk_of

LINES = [f"line {i} {'x' * 90}\n" for i in range(40)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "RETRY_SECONDS", 0.0)


def test_lines_wait_for_space_and_none_is_lost_or_doubled(tmp_path: Path) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "d.jsonl", said.append)
    with disk_of(1000):  # ends in the middle of a line
        for line in LINES[:30]:
            file.append(line)
        with pytest.raises(OSError, match="File too large"):
            file.sync()
        assert (tmp_path / "d.jsonl").stat().st_size == 1000
    for line in LINES[30:]:
        file.append(line)
    file.sync()
    assert (tmp_path / "d.jsonl").read_text() == "".join(LINES)
    assert said == [
        f"{tmp_path}/d.jsonl cannot be written: File too large; training goes on, and its lines "
        "are kept in memory",
        f"{tmp_path}/d.jsonl is written again; no line is lost",
    ]
    file.close()


def test_lines_that_are_lost_at_the_end_are_an_error(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "d.jsonl", lambda sentence: None)
    with disk_of(50):
        file.append(LINES[0])
        with pytest.raises(OSError, match="File too large"):
            file.close()
    file.close()  # a second time does nothing


def test_a_full_disk_is_not_tried_at_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_file, "RETRY_SECONDS", 1000.0)
    file = RecordFile(tmp_path / "d.jsonl", lambda sentence: None)
    with disk_of(0):
        file.append(LINES[0])
    file.append(LINES[1])
    assert (tmp_path / "d.jsonl").stat().st_size == 0
    file.close()
    assert (tmp_path / "d.jsonl").read_text() == LINES[0] + LINES[1]
