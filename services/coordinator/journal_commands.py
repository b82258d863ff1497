"""What the journal keeps of commands: the commands of each run, and the decisions they changed.

Both are tables of their own, which are added to a journal that lacks them. A coordinator that does
not know them leaves them alone: the file's version stays. Every row has a checksum; a damaged
command is left out, and the ranks tell it again once they have taken it.

Not covered: who writes when (`journal.py`).
"""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from google.protobuf import json_format

from switokd.distillation.decision import Decision
from switokd.distillation.overrides import Stamped
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import command_from_wire, command_to_wire

log = logging.getLogger(__name__)

TABLES = (
    """CREATE TABLE IF NOT EXISTS commands (
  run TEXT NOT NULL, id TEXT NOT NULL, command TEXT NOT NULL, first_step INTEGER NOT NULL,
  at REAL NOT NULL, failure TEXT NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (run, id)
)""",
    """CREATE TABLE IF NOT EXISTS overridden (
  run TEXT NOT NULL, step INTEGER NOT NULL, place INTEGER NOT NULL, held INTEGER NOT NULL,
  delta_scale REAL NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (run, step, place)
) WITHOUT ROWID""",
)
"""`overridden` has a row for each row of `decisions` that a command has changed."""
CUT_OVERRIDDEN = """DELETE FROM overridden WHERE run = ? AND step >= ?
  AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.run = overridden.run AND epoch = ?)"""
ADD_COMMAND = """INSERT INTO commands VALUES (?, ?, ?, ?, ?, ?, ?)
  ON CONFLICT (run, id) DO UPDATE SET command = excluded.command,
  first_step = excluded.first_step, at = excluded.at, failure = excluded.failure,
  crc = excluded.crc"""
ADD_OVERRIDDEN = "INSERT OR REPLACE INTO overridden VALUES (?, ?, ?, ?, ?, ?)"

Overridden = Mapping[tuple[int, int], tuple[bool, float] | None]
"""By step and place: whether the pair was held, and its scale; None: the row is damaged."""


def command_statement(run_id: str, stamped: Stamped) -> tuple[str, Sequence[object]]:
    """Return the statement that keeps a command, or its answer."""
    text = json.dumps(json_format.MessageToDict(command_to_wire(stamped.command)))
    row = (run_id, stamped.command.id, text, stamped.first_step, stamped.at, stamped.failure)
    return ADD_COMMAND, (*row, _crc(row))


def overridden_statements(
    run_id: str, decision: Decision
) -> Iterator[tuple[str, Sequence[object]]]:
    """Return the statements that keep what commands have changed in a decision; mostly none."""
    for place, pair in enumerate(decision.pairs):
        if pair.held or pair.delta_scale != 1:
            row = (run_id, decision.step, place, int(pair.held), pair.delta_scale)
            yield ADD_OVERRIDDEN, (*row, _crc(row))


def stored_commands(connection: sqlite3.Connection, run_id: str) -> list[Stamped]:
    """Return a run's commands, the oldest first."""
    rows = connection.execute("SELECT * FROM commands WHERE run = ? ORDER BY rowid", (run_id,))
    return list(_commands(run_id, rows))


def _commands(run_id: str, rows: Iterable[Sequence[object]]) -> Iterator[Stamped]:
    for *row, noted in rows:
        _, _, text, first_step, at, failure = row
        try:
            if _crc(row) != noted:
                raise ValueError("its checksum is another one")
            command = json_format.ParseDict(json.loads(str(text)), pb.Command())
            yield Stamped(
                command_from_wire(command), int(str(first_step)), float(str(at)), str(failure)
            )
        except (ValueError, json_format.ParseError) as error:
            log.warning("journal: a command of run %s is left out: %s", run_id, error)


def stored_overridden(
    connection: sqlite3.Connection, run_id: str, first: int, last: int = 2**62
) -> Overridden:
    """Return what commands have changed in a run, from step `first` to step `last`."""
    sql = "SELECT * FROM overridden WHERE run = ? AND step BETWEEN ? AND ?"
    return {
        (step, place): (bool(held), scale) if _crc((run, step, place, held, scale)) == crc else None
        for run, step, place, held, scale, crc in connection.execute(sql, (run_id, first, last))
    }


def _crc(row: Sequence[object]) -> int:
    return zlib.crc32(repr(tuple(row)).encode())
