"""Histories of runs in the journal, for the status page: also of runs that ended long ago.

A row of the table `histories` holds what `RunHistory` has kept in memory, written every half minute
and at the run's end. A run without a row was written by an earlier version, or its coordinator was
killed soon; what is missing then comes from the table of decisions. A long run has millions of
those: steps at even distances are read, in short batches, so that no decision waits for long.

Not covered: when rows are taken out (`finished.py`).
"""

from __future__ import annotations

import json
import logging
import sqlite3
import struct
import time
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from switokd.services.coordinator.history import MOST_ROWS, HistoryMemory, RunEvent, RunHistory
from switokd.services.coordinator.journal_commands import stored_overridden
from switokd.services.coordinator.journal_file import crc, whole_decisions
from switokd.services.coordinator.plan import Plan

log = logging.getLogger(__name__)

VERSION = 1
MOST_BYTES = 2**26
"""Largest history that is read."""
ROWS_IN_ALL = 60_000
"""Rows of decisions that are read of a run; reading them takes some tenths of a second."""
ROWS_AT_ONCE = 2_000
BUSY_SECONDS = 5.0
"""How long a reader waits for the thread that writes."""
KEEP = """INSERT OR REPLACE INTO histories SELECT ?1, ?2, ?3, ?4
  WHERE EXISTS (SELECT 1 FROM runs WHERE runs.run = ?1 AND epoch = ?2)"""
FIND = "SELECT history, crc, epoch FROM histories WHERE run = ?"
SPAN = "SELECT min(step), max(step) FROM decisions WHERE run = ? AND step > ?"
ROWS = """SELECT * FROM decisions WHERE run = ? AND step >= ? AND step < ?
  ORDER BY step, place"""


def history_statements(
    run_id: str, epoch: int, history: RunHistory
) -> Sequence[tuple[str, Sequence[object]]]:
    """Return the statement that keeps a history; call it on the thread that writes."""
    row = (run_id, epoch, packed(history))
    return ((KEEP, (*row, crc(row))),)


def fill_history(path: Path | None, run_id: str, history: RunHistory) -> None:
    """Add to an empty history what a journal has of the run. Faults are logged.

    path: None adds nothing.
    """
    if path is None:
        return
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as connection:
            row = connection.execute(FIND, (run_id,)).fetchone()
            if row and crc((run_id, row[2], row[0])) == row[1]:
                unpack(row[0], history)
            _add_decisions(connection, run_id, history)
    except (sqlite3.Error, ValueError, KeyError, TypeError, struct.error, zlib.error) as error:
        log.warning("journal: the history of run %s cannot be read: %s", run_id, error)


def history_from(path: Path | None, run_id: str, plan: Plan, memory: HistoryMemory) -> RunHistory:
    """Return the history of a run that this coordinator continues from its journal."""
    history = RunHistory(plan, memory)
    fill_history(path, run_id, history)
    # Its numbers must be higher than any of the earlier coordinator, which may have told more than
    # it has kept: readers ask for what comes after the last number that they know.
    history.event_count = max(history.event_count, int(time.time()))
    history.note("coordinator", "a new coordinator continues the run from its journal")
    return history


def _add_decisions(connection: sqlite3.Connection, run_id: str, history: RunHistory) -> None:
    """Add the decisions that come after the history, or as many as may be read."""
    first, last = connection.execute(SPAN, (run_id, history.step)).fetchone()
    if first is None:
        return
    for begin, end in _blocks(first, last + 1, max(len(history.pairs), 1)):
        rows = connection.execute(ROWS, (run_id, begin, end)).fetchall()
        changed = stored_overridden(connection, run_id, begin, end)
        for decision in whole_decisions(rows, changed):
            if tuple(p.pair for p in decision.pairs) == history.pairs:
                history.add(decision, at=0.0)
        history.take_in()
        time.sleep(0)  # others may go on


def _blocks(first: int, end: int, pairs: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of steps: all steps, or at even distances as many as may be read."""
    steps = end - first
    if steps * pairs <= ROWS_IN_ALL:
        size = max(ROWS_AT_ONCE // pairs, 1)
        yield from ((begin, min(begin + size, end)) for begin in range(first, end, size))
        return
    count = min(MOST_ROWS, max(ROWS_IN_ALL // pairs, 1))
    size = max(ROWS_IN_ALL // pairs // count, 1)
    for place in range(count):
        begin = first + place * steps // count
        yield begin, min(begin + size, end)


def packed(history: RunHistory) -> bytes:
    """Return a history as bytes."""
    with history.rows_lock:
        history.take_in_locked()
        arrays = [array(c.typecode, c) for c in history.columns.arrays]
        header: dict[str, Any] = {
            "version": VERSION,
            "topology": _topology(history),
            "stride": history.columns.stride,
            "step": history.step,
        }
    with history.lock:
        arrays += [array(c.typecode, c) for c in history.marks.arrays]
        header["spacing"] = history.marks.spacing
        header["event_count"] = history.event_count
        header["events"] = [event.document() for event in history.events]
    header["lengths"] = [len(arrays[0]), len(arrays[-1])]
    text = json.dumps(header).encode()
    content = b"".join((struct.pack("<I", len(text)), text, *(a.tobytes() for a in arrays)))
    return zlib.compress(content, 1)


def unpack(data: bytes, history: RunHistory) -> None:
    """Fill an empty history from bytes; ValueError and others if they are not those of `packed`.

    A history of other networks, or of another version, is left out.
    """
    content = zlib.decompressobj().decompress(data, MOST_BYTES)
    (size,) = struct.unpack_from("<I", content)
    header = json.loads(content[4 : 4 + size])
    if header["version"] != VERSION or header["topology"] != _topology(history):
        return
    rows, marks = header["lengths"]
    start = 4 + size
    made: list[array[Any]] = []
    counts = [rows] * len(history.columns.arrays) + [marks] * len(history.marks.arrays)
    for like, count in zip((*history.columns.arrays, *history.marks.arrays), counts, strict=True):
        end = start + count * like.itemsize
        made.append(array(like.typecode, content[start:end]))
        if len(made[-1]) != count:
            raise ValueError("it is cut off")
        start = end
    events = [RunEvent(**event) for event in header["events"]]
    with history.rows_lock, history.lock:
        own = len(history.columns.arrays)
        history.columns.arrays, history.marks.arrays = made[:own], made[own:]
        history.columns.stride, history.step = int(header["stride"]), int(header["step"])
        history.marks.spacing = float(header["spacing"])
        history.events.extend(events)
        history.event_count = int(header["event_count"])


def _topology(history: RunHistory) -> list[Any]:
    pairs = [[pair.teacher, pair.student] for pair in history.pairs]
    return [pairs, list(history.teachers), list(history.networks)]
