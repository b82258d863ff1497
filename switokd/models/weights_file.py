"""Reads a file of weights, and says in one sentence why another file is none.

A file is what `torch.save` writes, in its formats of today and before 1.6, or a safetensors file.
Reading runs no code of the file: classes other than those of harmless values are refused.

Not covered: where the state dict is in the content (`state_dicts.py`); files of several shards;
files of other frameworks, which are refused by name.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from switokd.errors import UsageError, first_line

HEAD_BYTES = 512
"""Bytes at a file's beginning that tell its kind."""

AGAIN = "copy or download it again"

KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the file; run 'git lfs pull'"),
    (b"<!doctype", f"it is a web page that was saved under this name; {AGAIN}"),
    (b"<html", f"it is a web page that was saved under this name; {AGAIN}"),
    (b"<?xml", f"it is an XML document that was saved under this name; {AGAIN}"),
    (b"\x1f\x8b", "it is compressed by gzip; unpack it with gunzip"),
    (b"bzh", "it is compressed by bzip2; unpack it with bunzip2"),
    (b"\xfd7zxz", "it is compressed by xz; unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "it is compressed by zstd; unpack it with unzstd"),
    (b"\x93numpy", "it is a NumPy array; save a state dict with torch.save"),
    (b"\x89hdf", "it is an HDF5 file, such as Keras writes; save a state dict with torch.save"),
)
"""How files that are not weights begin, in lower case, and what to say of them."""


def read_weights(path: Path, source: str) -> Any:
    """Return a file's content: tensors on the CPU, in dicts or whatever the file wraps them in.

    source: names the setting or run in errors. UsageError if the file cannot be read, or could
    not be read without running code.
    """
    try:
        return _read(path)
    except OSError as error:
        reason = error.strerror or first_line(error)
    except _Unreadable as error:
        reason = str(error)
    raise UsageError(f"{source}: {path} cannot be read: {reason}")


class _Unreadable(Exception):
    """Why a file cannot be read, as the end of a sentence."""


def _read(path: Path) -> Any:
    if os.path.isdir(path):
        names = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
        remedy = f" in it, such as {names[0]}" if names else "; there is none in it"
        raise _Unreadable(f"it is a folder; name a file of weights{remedy}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise _Unreadable("it is no regular file")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise _Unreadable(f"it is empty; {AGAIN}")
    start = head.lstrip().lower()
    for beginning, reason in KINDS:
        if head.startswith(beginning) or start.startswith(beginning):
            raise _Unreadable(reason)
    if head[257:262] == b"ustar":
        raise _Unreadable("it is a tar archive; unpack it with tar")
    if start.startswith(b"{"):
        raise _Unreadable(_about_json(path))
    return _read_safetensors(path) if _is_safetensors(path, head) else _read_torch(path, head)


_SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")


def _about_json(path: Path) -> str:
    """Describe a JSON file, which may be the index of a state dict in several files."""
    try:
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return "it is a JSON file, and holds no weights"
    return (
        f"it is the index of a state dict in {len(shards)} files; join them: load each, and save "
        "one dict with all entries by torch.save"
    )


def _is_safetensors(path: Path, head: bytes) -> bool:
    """Return whether a file is a safetensors file: the length of a JSON text, then this text."""
    return path.suffix == ".safetensors" or (head[8:9] == b"{" and head[5:8] == b"\0\0\0")


def _read_safetensors(path: Path) -> Any:
    # PyTorch reads such files by itself only from 2.14 on.
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except OSError:
        raise
    except Exception as error:  # a damaged header, or a type that this PyTorch lacks
        raise _Unreadable(
            f"it is no complete safetensors file ({first_line(error)}); {AGAIN}"
        ) from None


def _read_torch(path: Path, head: bytes) -> Any:
    try:
        # The warnings are of PyTorch's own parts, and of formats that are refused anyway.
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling raises many kinds of errors
        raise _Unreadable(_about_torch(path, head, error)) from None


def _harmless() -> list[Any]:
    """Return classes of values that training scripts save beside weights, and that run no code."""
    scalar = np.float64(0).__reduce__()[0]  # its module's name depends on NumPy's release
    dtypes: list[Any] = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    paths = [
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, pure in (
            ("PosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
        )
    ]
    numbers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *dict.fromkeys(dtypes), *numbers, *paths]


def _about_torch(path: Path, head: bytes, error: Exception) -> str:
    """Say why `torch.load` failed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith(".npy") for name in names):
            return "it holds NumPy arrays (.npz); save a state dict with torch.save"
        if any(name.endswith("/constants.pkl") for name in names):
            return (
                "it is a TorchScript program; save its state dict: "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
            )
        if not any(name.endswith("data.pkl") for name in names):
            return "it is a zip archive, but none that torch.save has written"
    elif head.startswith(b"PK"):
        return f"it is damaged, or not complete; {AGAIN}"
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named and isinstance(error, pickle.UnpicklingError):
        return (
            f"it holds more than tensors ({named[1]}), and to read that could run code of the "
            "file; if you trust it, load it with torch.load(FILE, weights_only=False), and save "
            "only the network's state_dict() with torch.save"
        )
    if head.startswith(b"\x80"):
        return f"it is damaged, or no file of torch.save; {AGAIN}"
    return "it is no state dict saved by torch.save, and no safetensors file"
