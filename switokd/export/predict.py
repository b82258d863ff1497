"""Predicts picture files with an artefact; files that cannot be read are reported and skipped.

Not covered: the network (`artefact.py`); printing (`cli/export.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from switokd.data.image_files import find
from switokd.data.network_input import Floats
from switokd.errors import UsageError
from switokd.export.artefact import BATCH, Artefact, Guess, batched

T = TypeVar("T")


def predict_files(
    artefact: Artefact,
    paths: Iterable[Path],
    top: int,
    on_bad: Callable[[UsageError], None],
) -> Iterator[tuple[Path, list[Guess]]]:
    """Yield each picture with its `top` most likely classes.

    paths: pictures, and folders that are searched with their subfolders.
    on_bad: called with an error for every path that is no picture; the other pictures are
    still predicted. Raises UsageError if the network takes no pictures.
    """
    artefact.check_takes_pictures()

    def attempt(work: Callable[[Path], T], path: Path) -> T | None:
        try:
            return work(path)
        except UsageError as error:
            on_bad(error)
            return None

    def readable() -> Iterator[tuple[Path, Floats]]:
        for path in paths:
            for picture in attempt(find, path) or []:
                image = attempt(artefact.prepare, picture)
                if image is not None:
                    yield picture, image

    for batch in batched(readable(), BATCH):
        guesses = artefact.predict([image for _, image in batch], top)
        yield from zip((path for path, _ in batch), guesses, strict=True)
