"""Image files in folders as they are found, with what systems and tools leave behind.

Not covered: the pixels (`test_pictures.py`); classes (`test_image_folder.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from switokd.data import image_files
from switokd.errors import UsageError

LEFT_BEHIND = (
    "._a.png",
    ".DS_Store",
    ".hidden/a.png",
    ".ipynb_checkpoints/a-checkpoint.png",
    "Thumbs.db",
    "THUMBS.DB/a.png",
    "desktop.ini",
    "__MACOSX/._a.png",
    "__MACOSX/b/a.png",
    "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg",
    "#recycle/a.png",
    "$RECYCLE.BIN/a.png",
    "System Volume Information/a.png",
    "lost+found/a.png",
    "__pycache__/a.png",
)
"""No images, whatever they end in."""


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in image_files.find(folder)]


def test_find_searches_subfolders_for_image_files(tmp_path: Path) -> None:
    touch(tmp_path, "z.png", "a/x.JPG", "a/b/y.jpeg", "a/notes.txt", "a/b/.TIFF", "q.Gif")
    assert found(tmp_path) == ["a/b/y.jpeg", "a/x.JPG", "q.Gif", "z.png"]
    assert image_files.find(tmp_path / "a" / "notes.txt") == [tmp_path / "a" / "notes.txt"]


def test_what_systems_leave_behind_is_no_image(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b/a.png", *LEFT_BEHIND, *(f"b/{name}" for name in LEFT_BEHIND))
    assert found(tmp_path) == ["a.png", "b/a.png"]


def test_names_above_the_searched_folder_do_not_matter(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/lost+found/a.png", ".cache/._b.png")
    assert found(tmp_path / ".cache" / "lost+found") == ["a.png"]
    assert image_files.find(tmp_path / ".cache" / "._b.png")  # the user has named this file


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.png", "real/b.png")
    touch(tmp_path, "searched/c.png")
    searched = tmp_path / "searched"
    (searched / "linked").symlink_to(tmp_path / "real")
    (searched / "d.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "back").symlink_to(searched)
    (searched / "self").symlink_to(".")
    assert found(searched) == ["c.png", "d.png", "linked/a.png", "linked/b.png"]


def test_links_to_nothing_are_kept_for_the_message(tmp_path: Path) -> None:
    for name in ("a.png", "folder", ".#lock", "notes.txt"):
        (tmp_path / name).symlink_to("nowhere")
    assert found(tmp_path) == ["a.png", "folder"]


def test_pipe_is_no_image(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert found(tmp_path) == ["a.png"]


def test_message_for_an_empty_folder_and_a_missing_path(tmp_path: Path) -> None:
    touch(tmp_path, "._a.png", "notes.txt")
    with pytest.raises(UsageError, match="no picture in this folder"):
        image_files.find(tmp_path)
    with pytest.raises(UsageError, match="no such file or folder"):
        image_files.find(tmp_path / "none.png")


def test_message_for_a_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.png", "locked/a.png")
    scandir = os.scandir

    def denied(folder: str | Path) -> object:
        if str(folder).endswith("locked"):  # permissions do not stop the superuser
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UsageError, match=r"locked cannot be read: Permission denied$"):
        image_files.find(tmp_path)
