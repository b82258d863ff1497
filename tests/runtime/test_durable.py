"""Files are replaced as a whole, and damage is found.

Not covered: a power failure.
"""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from switokd.errors import UsageError
from switokd.runtime.durable import (
    check_sum,
    read_checked,
    read_sums,
    replace_file,
    write_with_sum,
)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file of this process become larger than `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    write_with_sum(tmp_path, "a.pt", b"first")
    write_with_sum(tmp_path, "b.pt", b"second")
    write_with_sum(tmp_path, "a.pt", b"third")
    assert read_checked(tmp_path / "a.pt") == b"third"
    assert sorted(read_sums(tmp_path)) == ["a.pt", "b.pt"]
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    write_with_sum(tmp_path, "a.pt", b"weights")
    (tmp_path / "a.pt").write_bytes(b"wdights")
    for check in (check_sum, read_checked):
        with pytest.raises(UsageError, match=r"a\.pt is damaged: .* SHA256SUMS beside it"):
            check(tmp_path / "a.pt")


def test_a_file_without_a_checksum_is_not_checked(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"from elsewhere")
    check_sum(tmp_path / "a.pt")
    assert read_checked(tmp_path / "a.pt") == b"from elsewhere"


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path: Path) -> None:
    write_with_sum(tmp_path, "a.pt", b"old")
    with disk_of(10_000), pytest.raises(OSError, match="File too large"):
        write_with_sum(tmp_path, "a.pt", bytes(20_000))
    assert (tmp_path / "a.pt").read_bytes() == b"old"
    check_sum(tmp_path / "a.pt")
    with disk_of(10), pytest.raises(OSError, match="File too large"):
        replace_file(tmp_path / "b.pt", bytes(20))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["SHA256SUMS", "a.pt"]
