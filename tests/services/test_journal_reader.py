"""A journal is read without being changed, also if its coordinator was killed while it wrote.

Not covered: what is made of the rows (`tests/cli/test_replay.py`).
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from switokd.errors import UsageError
from switokd.services.coordinator import journal_reader
from switokd.services.coordinator.journal_reader import JournalReader
from tests.services.test_journal import decision, write

CRASH = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = TRUNCATE")
connection.execute("PRAGMA cache_size = 1")  # so that pages are written before the end
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE decisions SET gap = 9, crc = 0")
os._exit(9)
"""


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_rows_come_in_order_and_with_every_bit(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_reader, "BATCH", batch)
    write(tmp_path / "j", range(1, 21))
    before = (tmp_path / "j").read_bytes()
    reader = JournalReader(tmp_path / "j")
    found = reader.find("r")
    assert (found.epoch, found.begin, found.end, found.has_ended) == (1, 1, 20, False)
    rows = list(reader.rows(found))
    assert all(row["crc"] == checksum for row, checksum in rows)
    assert [(row["step"], row["teacher"], row["gap"], row["epsilon"]) for row, _ in rows] == [
        (step, p.pair.teacher, p.distances.gap, p.epsilon)
        for step in range(1, 21)
        for p in decision(step).pairs
    ]
    assert (tmp_path / "j").read_bytes() == before


def test_a_write_that_was_cut_off_is_taken_back_in_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, range(1, 400))
    subprocess.run([sys.executable, "-c", CRASH, str(path)], check=False, timeout=30)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(files[tmp_path / "j-journal"]) > 0
    reader = JournalReader(path)
    rows = [row for row, checksum in reader.rows(reader.find("r")) if row["crc"] == checksum]
    assert len(rows) == 2 * 399
    assert max(row["gap"] for row in rows) < 9
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_a_run_that_is_started_again_meanwhile_is_said(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 6))
    reader = JournalReader(tmp_path / "j")
    rows = reader.rows(reader.find("r"))
    next(rows)
    with closing(sqlite3.connect(tmp_path / "j")) as connection, connection:
        connection.execute("UPDATE runs SET epoch = 2")
    with pytest.raises(UsageError, match="run r was started again meanwhile; repeat the command"):
        list(rows)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 3))
    (tmp_path / "j").chmod(0)
    with pytest.raises(UsageError, match="it cannot be read"):
        JournalReader(tmp_path / "j")


def test_a_damaged_plan_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "j", range(1, 3))
    with closing(sqlite3.connect(tmp_path / "j")) as connection, connection:
        connection.execute("UPDATE runs SET plan = '{\"networks\": 3}'")
    with pytest.raises(UsageError, match="the plan of run r is damaged"):
        JournalReader(tmp_path / "j").find("r")
