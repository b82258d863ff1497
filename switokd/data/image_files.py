"""Finds the image files in a folder; what operating systems and tools leave behind is none.

The data sets of image files and `switokd predict` all look into folders here.

Not covered: the pixels of a file (`pictures.py`); which folder is which class (`image_folder.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from switokd.errors import UsageError, first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of image files in a folder; a file that the user names may have any suffix."""

IGNORED = frozenset(
    {
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "__macosx",
        "@eadir",
        "@recycle",
        "#recycle",
        "#snapshot",
        "lost+found",
        "__pycache__",
    }
)
"""Names, in lower case, that are no image and no class: of Windows, macOS, network storage, Linux
and Python. Names that begin with a dot are ignored as well."""


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is no image and no class."""
    return name.startswith(".") or name.lower() in IGNORED


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image; its content decides when it is read."""
    return name.lower().endswith(SUFFIXES) and not is_ignored(name)


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return a folder's entries without the ignored ones, sorted by name.

    UsageError if the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            kept = [entry for entry in found if not is_ignored(entry.name)]
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from None
    return sorted(kept, key=lambda entry: entry.name)


def is_dangling(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a symbolic link to something that is not there."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def why_missing(path: str | Path) -> str:
    """Say why nothing can be found at a path."""
    try:
        os.stat(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            return f"it is a link to {os.readlink(path)}, which is not there"
        return error.strerror or first_line(error)
    return "it is not a folder"


def below(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the paths of the image files in a folder and its subfolders; follows links.

    A link to nowhere is yielded if it may be an image or a folder of images: reading it fails, so
    it is not lost in silence. above: real paths of the folders that are being searched; a link
    back to one of them is skipped. UsageError if a folder cannot be read.
    """
    above = (*above, os.path.realpath(folder))
    for entry in entries(folder):
        if entry.is_dir():
            if os.path.realpath(entry.path) not in above:
                yield from below(entry.path, above)
        elif is_image_name(entry.name):
            # A pipe or device of such a name is no image; opening it could wait for ever.
            if entry.is_file() or is_dangling(entry):
                yield entry.path
        elif not Path(entry.name).suffix and is_dangling(entry):
            yield entry.path


def find(path: Path) -> list[Path]:
    """Return the file itself, or all image files in a folder and its subfolders, sorted.

    UsageError if the path does not exist, or the folder has no image files or cannot be read.
    """
    if os.path.isdir(path):
        files = sorted(map(Path, below(path)))
        if not files:
            raise UsageError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
        return files
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such file or folder")
    return [path]
