"""Data sets of Hugging Face's library `datasets`: from a folder, or by name.

A folder that `save_to_disk` has written is read as it is. For any other folder, and for a name,
`datasets.load_dataset` finds the files: in the folder, on the hub, or in its cache.

Not covered: streaming, because samples are read by number; splits that are made on the fly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switokd.config.data_section import Data
from switokd.data import items as forms
from switokd.data.own import of_items
from switokd.data.scale import Scale
from switokd.data.sources import Sources
from switokd.errors import UsageError, summary

TEST_SPLITS = ("validation", "valid", "val", "dev", "test")
"""Names of the split to evaluate on, the first one that is there: a test split of the hub often has
no labels."""


def open_hugging_face(data: Data) -> Sources:
    """Open a data set; UsageError if it cannot be opened, or has no such splits or columns.

    data.kwargs: train and test are names of splits; the others go to `datasets.load_dataset`.
    """
    kwargs = {"train": "train", "test": None, **data.kwargs}
    wanted = kwargs.pop("train"), kwargs.pop("test")
    splits = _splits(data.root, kwargs)
    train = _chosen("train", wanted[0], ("train",), splits, data.root)
    test = _chosen("test", wanted[1], TEST_SPLITS, splits, data.root)
    scale = Scale.to(data.image_size).of_any_mode() if data.image_size else None
    where = f"data.root {data.root}"
    keys = _columns(splits[train], data.keys, where)
    parts = (
        Rows(splits[train].select_columns(list(keys)), keys, scale.train if scale else None),
        Rows(splits[test].select_columns(list(keys)), keys, scale.test if scale else None),
    )
    sources = of_items(parts, where, reader=__file__)
    unused = [str(name) for name in splits[train].column_names if name not in keys]
    notes = [f"{where}: trains on the split {train}, evaluates on {test}"]
    if unused:
        notes += [f"{where}: image {keys[0]}, label {keys[1]}; not used: {', '.join(unused)}"]
    sources = replace(sources, notes=tuple(notes))
    return scale.applied_to(sources) if scale else sources


@dataclass(frozen=True)
class Rows:
    """The rows of a split as pairs (image, label)."""

    rows: Any
    keys: forms.Keys
    transform: Callable[[Any], Any] | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = forms.parts_of(self.rows[index], self.keys)
        return image if self.transform is None else self.transform(image), label

    @cached_property
    def targets(self) -> NDArray[Any]:
        """The labels of all rows, read without the images."""
        name = self.keys[1]
        return np.asarray(self.rows.select_columns([name]).with_format("numpy")[:][name])

    @property
    def classes(self) -> int | list[str] | None:
        """Names of the classes, or their number; None if the labels are no whole numbers."""
        if names := getattr(self.rows.features[self.keys[1]], "names", None):
            return list(names)
        is_whole = self.targets.dtype.kind in "iu" and self.targets.ndim == 1
        return int(self.targets.max()) + 1 if is_whole else None


def _splits(root: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a data set's splits by name; UsageError if it cannot be opened, or has no splits."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise UsageError(
            "data.dataset huggingface: datasets is not installed; pip install datasets, or switokd "
            "with its extra 'huggingface' (switokd[huggingface])"
        ) from None
    folder = Path(root)
    saved = {file.parent.name: str(file.parent) for file in sorted(folder.glob("*/state.json"))}
    is_saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    if kwargs and (is_saved or saved):
        raise UsageError(
            f"data.kwargs: {', '.join(kwargs)} go to load_dataset, but {root} is a folder that "
            "save_to_disk has written; allowed: train and test, names of splits"
        )
    try:
        if is_saved:
            opened = datasets.load_from_disk(root)
        elif saved:
            opened = {name: datasets.load_from_disk(path) for name, path in saved.items()}
        else:
            opened = datasets.load_dataset(root, **kwargs)
    except Exception as error:  # of files, of the network, of kwargs: the library raises many kinds
        raise UsageError(
            f"data.root: {root}: Hugging Face's datasets cannot open it: {summary(error)}; give a "
            "folder that save_to_disk has written, or the name of a data set"
        ) from error
    if not isinstance(opened, Mapping):
        raise UsageError(
            f"data.root: {root} is one set without splits; save a DatasetDict with train and test, "
            "such as dataset.train_test_split(0.1)"
        )
    return {str(name): rows for name, rows in opened.items()}


def _chosen(
    setting: str, wanted: Any, usual: tuple[str, ...], splits: Mapping[str, Any], root: str
) -> str:
    """Return the name of a split: the one that is wanted, or the first of the usual ones."""
    names = usual if wanted is None else (wanted,)
    for name in names:
        if name in splits:
            return str(name)
    raise UsageError(
        f"data.root: {root} has no split {' or '.join(map(str, names))}; its splits are "
        f"{', '.join(splits)}: name one with data.kwargs={{{setting}: NAME}}"
    )


def _columns(rows: Any, keys: forms.Keys | None, where: str) -> forms.Keys:
    """Return the columns of image and label; UsageError if they cannot be told or used."""
    columns = getattr(rows, "column_names", None)
    if not columns or not hasattr(rows, "select_columns") or not hasattr(rows, "__len__"):
        raise UsageError(f"{where}: its rows can only be streamed; leave out streaming=true")
    try:
        image, label = forms.choose(dict.fromkeys(columns), keys)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if getattr(rows.features[label], "dtype", None) in ("string", "large_string"):
        raise UsageError(
            f"{where}: the labels in {label} are text; save the data set after "
            f"class_encode_column({label!r}), which numbers them"
        )
    return image, label
