"""WebDataset's shards: .tar files in which files of one name are one sample.

    train/000000.tar: ant1.jpg, ant1.cls, bee7.jpg, bee7.cls, ...

An index of all members is made when the shards are opened. With it any sample can be read by its
number, so that order and pixels are those of any other data set: a function of the seed alone. The
library `webdataset` reads shards from their begin instead. Its order depends on the number of
processes and on a buffer.

Not covered: compressed shards, which cannot be read from the middle; shards behind a URL; Python
objects (.pyd, .pickle), which run code when they are read.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from switokd.config.data_section import Data
from switokd.data import items as forms
from switokd.data.own import of_items
from switokd.data.scale import Scale
from switokd.data.sources import Sources
from switokd.errors import UsageError, first_line, own_code_errors

TRAIN, TEST = ("train", "training"), ("val", "valid", "validation", "test")
"""Names of a folder, or parts of a shard's name."""

MOST_SHARDS = 1_000_000
"""Shards that one pattern may name."""

Member = tuple[int, int]
"""Where the bytes of a file begin in its shard, and their number."""


def open_shards(data: Data) -> Sources:
    """Open data.root's shards; UsageError if there are none, or their samples do not fit.

    data.kwargs: train and test are patterns of file names below data.root, such as 'a-*.tar' or
    'a-{000..146}.tar'.
    """
    unknown = set(data.kwargs) - {"train", "test"}
    if unknown:
        raise UsageError(
            f"data.kwargs: found {', '.join(sorted(unknown))}; allowed for webdataset: train and "
            "test, patterns of file names such as 'train-*.tar'"
        )
    scale = Scale.to(data.image_size).of_any_mode() if data.image_size else None
    root, where = Path(data.root), f"data.root {data.root}"
    files = [
        _files(root, setting, data.kwargs.get(setting), names)
        for setting, names in (("train", TRAIN), ("test", TEST))
    ]
    train = Shards.of(files[0], data.keys, f"{where}, training", scale.train if scale else None)
    test = Shards.of(files[1], data.keys, f"{where}, test", scale.test if scale else None)
    sources = of_items((train, test), where, reader=__file__)
    sources = replace(sources, notes=(f"{where}: {train.unused}",) if train.unused else ())
    return scale.applied_to(sources) if scale else sources


def _files(root: Path, setting: str, pattern: Any, names: Sequence[str]) -> list[Path]:
    """Return the shards of one part, sorted; UsageError if there are none.

    pattern: of the run file; None: those in a folder of one of the names, or with one of them in
    the file's own name.
    """
    if pattern is not None:
        found = _matching(root, setting, pattern)
    else:
        folders = [root / name for name in names if (root / name).is_dir()]
        found = [file for folder in folders[:1] for file in sorted(folder.glob("*.tar"))]
        word = re.compile(rf"(^|[^a-z])({'|'.join(names)})([^a-z]|$)")
        found = found or [f for f in sorted(root.glob("*.tar")) if word.search(f.name.lower())]
    if not found:
        usual = (
            f"*.tar in {' or '.join(names)}/, nor {' or '.join(names)} in the name of a .tar file"
        )
        raise UsageError(
            f"data.root: {root.resolve()} has no {usual if pattern is None else pattern}; name the "
            f"shards with data.kwargs={{{setting}: PATTERN}}, where * stands for any letters"
        )
    return found


def _matching(root: Path, setting: str, pattern: Any) -> list[Path]:
    """Return the sorted files of a pattern; UsageError if it is invalid, or a number has no file.

    `{000..146}` in a pattern stands for all these numbers, as in WebDataset's own patterns.
    """
    text = str(pattern)
    if numbers := re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", text):
        first, last = map(int, numbers.groups())
        if last - first >= MOST_SHARDS:
            raise UsageError(f"data.kwargs: {setting}: {text} names more than {MOST_SHARDS} shards")
        width, found = len(numbers[1]), list[Path]()
        for number in range(first, last + 1):
            one = f"{text[: numbers.start()]}{number:0{width}}{text[numbers.end() :]}"
            if not (files := _matching(root, setting, one)):
                raise UsageError(f"data.root: {root.resolve()} has no {one}, of {setting}: {text}")
            found += files
        return sorted(found)
    try:
        return sorted(root.glob(text))
    except (ValueError, NotImplementedError) as error:
        raise UsageError(
            f"data.kwargs: {setting}: {text!r} is no pattern of file names below data.root: {error}"
        ) from None


@dataclass(frozen=True)
class Shards:
    """Samples of shards by number, as pairs (image, label)."""

    files: tuple[Path, ...]
    images: NDArray[np.int64]
    """By sample: number of the shard, begin and number of the image's bytes, number of its kind."""
    kinds: tuple[str, ...]
    """Suffixes of the images."""
    labels: NDArray[np.int64] | list[Any]
    """By sample; a list if they are no whole numbers."""
    transform: Callable[[Any], Any] | None
    unused: str
    """Names the files of the first sample that are not used, and those that are; may be empty."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        shard, begin, size, kind = self.images[index].tolist()
        # Opened for each read: loader processes must not share a position in the file.
        with self.files[shard].open("rb") as file:
            content = _read(file, (begin, size))
        try:
            image = decode(content, self.kinds[kind])
        except Exception as error:  # decoders raise many kinds of errors
            name = _name_of_member(self.files[shard], begin)
            raise UsageError(
                f"{self.files[shard]}: {name} cannot be read: {_reason(error)}"
            ) from error
        return image if self.transform is None else self.transform(image), self.labels[index]

    @property
    def targets(self) -> NDArray[np.int64] | None:
        """The labels of all samples; None if they are no whole numbers."""
        return self.labels if isinstance(self.labels, np.ndarray) else None

    @property
    def classes(self) -> int | None:
        """One more than the largest label; None if labels are no whole numbers."""
        return None if self.targets is None else int(self.targets.max()) + 1

    @classmethod
    def of(
        cls,
        files: Sequence[Path],
        keys: forms.Keys | None,
        where: str,
        transform: Callable[[Any], Any] | None,
    ) -> Shards:
        """Make the index of shards, and read the labels.

        where: names the part of the data set in errors. UsageError if a shard cannot be read or is
        compressed, or if nothing tells a sample's image and label.
        """
        images: list[tuple[int, int, int, int]] = []
        labels: list[Any] = []
        kinds: dict[str, int] = {}
        unused = ""
        for number, path in enumerate(files):
            with _shard(path) as (file, shard):
                for sample in _samples(shard):
                    with own_code_errors(
                        f"{where} sample {len(labels)}", __file__, every_rank=True
                    ):
                        try:
                            image, label = map(str, forms.choose(sample, keys))
                        except UsageError as error:
                            raise UsageError(f"{where} sample {len(labels)}: {error}") from None
                        kind = kinds.setdefault(_kind(image), len(kinds))
                        if not labels and (rest := forms.left_out(sample, (image, label))):
                            unused = f"image {image}, label {label}; not used: {rest}"
                        images.append((number, *sample[image], kind))
                        labels.append(decode(_read(file, sample[label]), _kind(label)))
        # A larger number is no class; it is reported like any other invalid label.
        are_whole = len(labels) and all(type(n) is int and abs(n) < 2**63 for n in labels)
        known = np.array(labels, dtype=np.int64) if are_whole else labels
        at = np.array(images, dtype=np.int64).reshape(-1, 4)
        return cls(tuple(files), at, tuple(kinds), known, transform, unused)


@contextmanager
def _shard(path: Path) -> Iterator[tuple[BinaryIO, tarfile.TarFile]]:
    """Open a shard; UsageError if it cannot be read as a file or as a tar file."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
            yield file, shard
    except (OSError, tarfile.TarError) as error:
        raise UsageError(
            f"data.root: {path} cannot be read as an uncompressed .tar file: {error}"
        ) from error


def _samples(shard: tarfile.TarFile) -> Iterator[dict[str, Member]]:
    """Yield the samples of a shard: files by suffix, in lower case.

    The files of a sample follow each other. Folders, hidden files and files without a suffix are
    left out.
    """
    name, sample = None, dict[str, Member]()
    for member in shard:
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.lower().partition(".")
        if not member.isfile() or not stem or not suffix:
            continue
        if (folder, stem) != name and sample:
            yield sample
            sample = {}
        if suffix in sample:
            raise tarfile.TarError(f"{member.name} is there twice")
        name = folder, stem
        sample[suffix] = member.offset_data, member.size
    if sample:
        yield sample


def _name_of_member(path: Path, begin: int) -> str:
    """Return the name of the file whose bytes begin at a position of a shard."""
    with _shard(path) as (_, shard):
        return next((m.name for m in shard if m.offset_data == begin), "a file in it")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "Pillow does not know its format, or it is damaged"
    return first_line(error)


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member[0])
    return file.read(member[1])


def _kind(suffix: str) -> str:
    """Return the last part of a suffix, which tells how to decode a file."""
    return suffix.rpartition(".")[2]


def decode(content: bytes, kind: str) -> Any:
    """Decode a file by the last part of its suffix; files of unknown kinds stay bytes."""
    if kind in forms.ENCODED:
        image = Image.open(io.BytesIO(content))
        image.load()
        return image
    if kind == "npy":
        return np.load(io.BytesIO(content), allow_pickle=False)
    if kind == "json":
        return json.loads(content)
    text = content.decode(errors="replace").strip()
    if kind in forms.LABEL_NAMES or kind in ("index", "txt", "id"):
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,1000}", text) else text
    return content
