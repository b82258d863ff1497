"""What a process uses: memory, and the free space of its run folder."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from switokd.runtime.usage import ProcessUsage, free_bytes, gpu_memory_bytes, memory_bytes
from tests.support import wait_until


def test_memory_is_that_of_the_process() -> None:
    found, expected = memory_bytes(), psutil.Process().memory_info().rss
    assert found is not None
    assert abs(found - expected) < 64 * 2**20


def test_free_space_is_known_while_the_folder_is_watched(tmp_path: Path) -> None:
    process = ProcessUsage()

    def known() -> int | None:
        return process.disk_free

    with process.watching(None):
        assert known() is None
    with process.watching(tmp_path):
        found = wait_until(known, 10, "the free space")
        assert abs(found - psutil.disk_usage(str(tmp_path)).free) < 2**30
    assert known() is None
    assert free_bytes(tmp_path / "gone") is None


def test_a_process_that_uses_no_gpu_says_nothing_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert gpu_memory_bytes() is None
