"""Files that survive a crash: replaced as a whole, on the disk before they count, with checksums.

The checksums of a folder's files are in SHA256SUMS, in the format of `sha256sum -c`. Imported
without torch.

Not covered: which files a run writes (`runs/run_folder.py`, `runs/checkpoints.py`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from switokd.errors import UsageError
from switokd.runtime.phase import ACTIVITY

SUMS = "SHA256SUMS"

PIECE = 64 * 2**20
"""Bytes that are written at once. A rank that writes a large file slowly does not hang."""


def replace_file(path: Path, content: bytes | memoryview, mode: int = 0o666) -> None:
    """Write a file so that either the old or the whole new content is there, also after a crash.

    mode: of the file, less what the umask takes away; 0o600 is for secrets. OSError if the disk is
    full or read-only; the old file is then unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with suppress(FileNotFoundError):  # left by a crash, perhaps with other permissions
            partial.unlink()
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            for begin in range(0, len(content), PIECE):
                file.write(content[begin : begin + PIECE])
                ACTIVITY.progress()
            file.flush()
            os.fsync(file.fileno())
            ACTIVITY.progress()
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_with_sum(folder: Path, name: str, content: bytes | memoryview) -> None:
    """Replace a file and note its checksum; after a crash in between it has no checksum."""
    sums = read_sums(folder)
    if sums.pop(name, None):
        _write_sums(folder, sums)
    replace_file(folder / name, content)
    _write_sums(folder, {**sums, name: hashlib.sha256(content).hexdigest()})


def read_checked(path: Path) -> bytes:
    """Return a file's content. UsageError if its checksum is another one; OSError as `open`."""
    content = path.read_bytes()
    noted = read_sums(path.parent).get(path.name)
    if noted and noted != hashlib.sha256(content).hexdigest():
        raise UsageError(
            f"{path} is damaged: its content is not the one that was written, as {SUMS} beside it "
            "shows; use a copy of the file, or train again"
        )
    return content


def check_sum(path: Path) -> None:
    """UsageError if a file has a checksum beside it that is not the one of its content."""
    if path.name in read_sums(path.parent) and path.is_file():
        read_checked(path)


def read_sums(folder: Path) -> dict[str, str]:
    """Return the noted checksums by file name; empty if the folder has none."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (line.split("  ", 1) for line in lines if "  " in line)
    return {name: digest for digest, name in pairs}


def _write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    replace_file(folder / SUMS, lines.encode())
