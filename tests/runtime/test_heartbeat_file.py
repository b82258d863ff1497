"""The file that says that a rank is alive.

Not covered: the probes that look at it (`tests/deploy/test_cluster.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from switokd.runtime import heartbeat_file
from tests.support import wait_until


def test_the_file_is_touched_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(heartbeat_file.FOLDER, str(tmp_path / "beats"))
    monkeypatch.setattr(heartbeat_file, "INTERVAL_SECONDS", 0.02)
    with heartbeat_file.heartbeat_file(3):
        file = tmp_path / "beats" / "rank-3"
        first = file.stat().st_mtime_ns
        wait_until(lambda: file.stat().st_mtime_ns > first, 30, "a touch")
    assert not file.exists()


def test_without_the_variable_there_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(heartbeat_file.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    with heartbeat_file.heartbeat_file(0):
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(heartbeat_file.FOLDER, str(tmp_path / "file"))
    with heartbeat_file.heartbeat_file(0):
        pass
