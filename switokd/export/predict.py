"""Predicting picture files with an artefact: any number, of which some may be broken.

Not covered: the network (`artefact.py`); printing (`export.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from switokd.data import pictures
from switokd.errors import UsageError
from switokd.export.artefact import (
    BATCH,
    Artefact,
    Guess,
    batched,
)

T = TypeVar("T")


def predict_files(
    artefact: Artefact,
    paths: Iterable[Path],
    top: int,
    on_bad: Callable[[UsageError], None],
) -> Iterator[tuple[Path, list[Guess]]]:
    """Give each picture's `top` likeliest classes; folders are searched, also below.

    on_bad is told of every path that is no picture; the others go on. UsageError if the network
    cannot be given pictures at all.
    """
    artefact.check_takes_pictures()

    def attempt(work: Callable[[Path], T], path: Path) -> T | None:
        try:
            return work(path)
        except UsageError as error:
            on_bad(error)
            return None

    def readable() -> Iterator[tuple[Path, pictures.Floats]]:
        for path in paths:
            for picture in attempt(pictures.find, path) or []:
                image = attempt(artefact.prepare, picture)
                if image is not None:
                    yield picture, image

    for batch in batched(readable(), BATCH):
        guesses = artefact.predict([image for _, image in batch], top)
        yield from zip((path for path, _ in batch), guesses, strict=True)
