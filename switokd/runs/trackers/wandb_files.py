"""Reads the rows that offline runs of Weights & Biases have left on the disk.

Such a file is a log in LevelDB's format, behind a header: blocks with records, each of which holds
a protobuf message. The package itself has no reader for Python.

Not covered: anything but rows of numbers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
"""Kinds of pieces of a record: the only one, or one of several."""


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of all offline runs in RUN_FOLDER/wandb, in the order of their files.

    Values are those of JSON, by name. The rest of a file that was cut off is left out.
    """
    message = import_module("wandb.proto.wandb_internal_pb2").Record
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for content in _records(path.read_bytes()):
            record = message()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the whole records of a log."""
    record, place = b"", HEADER.size  # the file's own header is as long as that of a piece
    while place + HEADER.size <= len(content):
        left = BLOCK - place % BLOCK
        _, length, kind = HEADER.unpack_from(content, place)
        if left < HEADER.size or kind == 0:  # the rest of a block is empty
            place += left
            continue
        begin, place = place + HEADER.size, place + HEADER.size + length
        piece = content[begin:place]
        if len(piece) < length or kind > LAST:
            return
        record = piece if kind in (FULL, FIRST) else record + piece
        if kind in (FULL, LAST):
            yield record
