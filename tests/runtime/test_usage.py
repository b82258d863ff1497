"""What a process uses: memory, and the free space of its run folder."""

from __future__ import annotations

from pathlib import Path

import psutil

from switokd.runtime import usage
from switokd.runtime.usage import ProcessUsage, free_bytes, memory_bytes
from tests.support import wait_until


def test_memory_is_that_of_the_process() -> None:
    found, expected = memory_bytes(), psutil.Process().memory_info().rss
    assert found is not None
    assert abs(found - expected) < 64 * 2**20


def test_free_space_is_known_while_the_folder_is_watched(tmp_path: Path) -> None:
    process = ProcessUsage()
    with process.watching(None):
        assert process.disk_free is None
    with process.watching(tmp_path):
        wait_until(lambda: process.disk_free is not None, 10, "the free space")
        assert process.disk_free is not None
        assert abs(process.disk_free - psutil.disk_usage(str(tmp_path)).free) < 2**30
    assert process.disk_free is None
    assert free_bytes(tmp_path / "gone") is None


def test_a_process_without_a_gpu_says_nothing_of_one() -> None:
    import torch

    if not torch.cuda.is_initialized():
        assert usage.gpu_memory_bytes() is None
