"""The record of a run, row by row: a run folder's decision log, or a coordinator's journal.

Both may grow while they are read. A last line without its end is being written, or is torn.

Not covered: what the rows must be (`sequence.py`, `derive.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from switokd.config.run_file import import_folders, load
from switokd.config.run_folders import config_file
from switokd.coordination.command_file import COMMANDS, read_commands
from switokd.distillation.decision import InForce, Rule
from switokd.distillation.overrides import Overrides
from switokd.distillation.semantics import rule_of
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Topology
from switokd.errors import UsageError, nearest
from switokd.runs.json_lines import read_lines
from switokd.services.coordinator.journal_file import is_sqlite
from switokd.services.coordinator.journal_reader import JournalReader

FLOATS = ("gap", "e_s", "e_t", "epsilon", "delta")
FIELDS = ("step", "teacher", "student", *FLOATS, "mode", "n")
TYPES = (int, str, str, *[float] * len(FLOATS), str, int)
"""Types of the fields, as JSON has them."""
PLAIN = (False, 1.0, None)
"""held, delta_scale and paused of a line that says nothing about them."""


class Row(NamedTuple):
    """One pair of one step, as it was recorded."""

    step: int
    teacher: str
    student: str
    gap: float
    e_s: float
    e_t: float
    epsilon: float
    delta: float
    mode: str
    n: int
    held: bool
    """Whether a command of an operator held the pair in its mode."""
    delta_scale: float
    """What a command multiplied the threshold by; 1: nothing."""
    paused: bool | None
    """Whether the teacher was paused; None where the record does not say so."""
    place: int
    """Number of the line or row, counted from 1."""
    checksums: tuple[int, int] | None = None
    """The recorded and the right checksum, if they differ."""


@dataclass(frozen=True)
class Deciding:
    """How a run decides. UsageError if the strategy cannot be made."""

    topology: Topology
    strategy: str
    kwargs: Mapping[str, Any]
    semantics: str = "paper"

    @cached_property
    def rule(self) -> Rule:
        """The rule of the run."""
        strategy = make_strategy(self.strategy, self.kwargs)
        return rule_of(strategy, self.semantics, self.topology)


class Record:
    """Where the rows come from. `read` may be called several times."""

    name: str
    """For titles: the run folder, or the run's id."""
    deciding: Deciding
    import_folders: Sequence[str]
    """Where a strategy of the user's own is searched."""
    first_step = 1
    """The step that the record must begin with."""
    last_step: int | None = None
    """The step that the record must end with; None while the run goes on."""
    paused_until: Mapping[int, Mapping[str, int]] = {}
    """By step and teacher: in how many steps the run says that it has paused, up to the step."""
    part_read = 0.0
    """Part of the record that was read, 0 to 1."""
    place = "line"
    """What a row's number counts."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        """Sentences on what was found while reading, and is no difference."""

    def read(self) -> Iterator[Row]:
        """Yield the rows; UsageError, with its number, for one that is damaged."""
        raise NotImplementedError

    def in_force(self, step: int) -> InForce | None:
        """What the run's commands change at a step; None where these are not known."""
        return None


class FolderRecord(Record):
    """The record of a run folder. UsageError if the folder holds no run, or no decisions."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name, self._file = str(path), path / "decisions.jsonl"
        config = load(str(_config_file(path)))
        self.import_folders = import_folders(config, path.resolve())
        distillation = config.distillation
        self.deciding = Deciding(
            config.topology,
            distillation.strategy,
            distillation.strategy_kwargs,
            distillation.semantics,
        )
        if not os.path.isfile(self._file) or not self._file.stat().st_size:
            raise UsageError(f"{path}: the run has no decisions yet, so there is nothing to derive")
        self._read_results(path, skips=config.schedule.on_nonfinite == "skip")
        self._commands, self._commands_size = Overrides(), 0
        self._read_commands()

    def _read_commands(self) -> None:
        """Read the run's commands, unless they are those that were read before."""
        path = self._file.with_name(COMMANDS)
        size = path.stat().st_size if path.exists() else 0
        if size != self._commands_size:
            topology = self.deciding.topology
            found = read_commands(path.parent, topology.teachers)
            self._commands, self._commands_size = Overrides(topology.pairs, found), size

    def in_force(self, step: int) -> InForce:
        """See `Record`. A command is in its file before the first step that it changes."""
        if self.last_step is None:  # the run goes on
            self._read_commands()
        return self._commands.at(step)

    def _read_results(self, path: Path, skips: bool) -> None:
        """Note what summary.json and metrics.jsonl say about the decisions."""
        try:
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            self.last_step = max(network["steps"] for network in summary["networks"].values())
        except FileNotFoundError:
            self.notes.append("the run has not finished: the record is read as far as it goes")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path / 'summary.json'} is damaged: it cannot be read") from None
        if skips:  # a skipped step has a decision, and is not counted as paused
            return
        paused: dict[int, dict[str, int]] = {}
        try:
            for line in read_lines(path / "metrics.jsonl"):
                if line["role"] == "teacher":
                    paused.setdefault(line["step"], {})[line["network"]] = line["steps_paused"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"{path / 'metrics.jsonl'} is damaged: it cannot be read") from None
        self.paused_until = paused

    def read(self) -> Iterator[Row]:
        """See `Record`."""
        # `json.loads` takes twice as long.
        scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
        fields = itemgetter(*FIELDS)
        size, done, number = max(self._file.stat().st_size, 1), 0, 0
        # Damaged bytes become an escape that JSON does not have.
        with self._file.open(encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line[-1] != "\n":
                    self.notes.append(
                        f"the last line ({number}) is not complete: it is being written, or torn"
                    )
                    return
                done += len(line)
                self.part_read = done / size
                try:
                    found, end = scan(line, 0)
                except (ValueError, StopIteration, RecursionError):
                    self._refuse(number, "it is not JSON")
                if end != len(line) - 1:
                    self._refuse(number, "something follows the JSON object")
                try:
                    values = fields(found)
                except KeyError as error:
                    self._refuse(number, f"it has no {error.args[0]!r}")
                except (TypeError, IndexError):
                    self._refuse(number, "it is no JSON object")
                more = PLAIN
                if len(found) != len(FIELDS) or tuple(map(type, values)) != TYPES:
                    self._check_types(number, found)
                    more = (found.get("held", False), found.get("delta_scale", 1.0), None)
                # The constructor of a named tuple takes three times as long.
                yield tuple.__new__(Row, (*values, *more, number, None))

    def _check_types(self, number: int, found: Mapping[str, Any]) -> None:
        """UsageError if a field has a value of the wrong type, or is unknown."""
        more: dict[str, tuple[type, ...]] = {"held": (bool,), "delta_scale": (float, int)}
        for name, kind in zip(FIELDS, TYPES, strict=True):
            more[name] = (float, int) if kind is float else (kind,)
        for name, value in found.items():
            if name not in more:
                self._refuse(number, f"it has an unknown field {name!r}{nearest(name, more)}")
            if type(value) not in more[name]:
                self._refuse(number, f"{name} is {value!r}")

    def _refuse(self, number: int, why: str) -> NoReturn:
        raise UsageError(
            f"{self._file}: line {number} is damaged: {why}; restore the file, or cut it before "
            "this line to replay the steps before it"
        ) from None


class JournalRecord(Record):
    """A run's record in a coordinator's journal, which may be in use. UsageError as `read`.

    path: the SQLite file. run_id: the run's id there.
    """

    place = "row"

    def __init__(self, path: Path, run_id: str) -> None:
        super().__init__()
        self.name = run_id
        self._reader = JournalReader(path)
        stored = self._reader.find(run_id)
        plan = stored.plan
        self.import_folders = [os.getcwd()]
        kwargs = json.loads(plan.strategy_kwargs or "{}")
        self.deciding = Deciding(plan.topology, plan.strategy, kwargs, plan.semantics)
        self._run = stored
        if stored.begin is None:
            raise UsageError(
                f"--journal {path}: run {run_id} has no decisions yet, so there is nothing to "
                "derive"
            )
        self._commands: Overrides | None = None
        self._read_commands()
        # A journal may be younger than its run: it then begins where the run was continued.
        self.first_step = 1 if stored.begin < plan.first_step else plan.first_step
        if not stored.has_ended:
            self.notes.append("the run has not ended: the record is read as far as it goes")

    def _read_commands(self) -> None:
        found = self._reader.commands(self._run)
        self._commands = None if found is None else Overrides(self.deciding.topology.pairs, found)

    def in_force(self, step: int) -> InForce | None:
        """See `Record`. What the decisions themselves say of commands is not believed."""
        return self._commands.at(step) if self._commands else None

    def _is_new(self, row: Row) -> bool:
        """Whether a row speaks of a command that is not known: the run may have got it since."""
        pair, in_force = Pair(row.teacher, row.student), self.in_force(row.step)
        if self._run.has_ended or in_force is None:
            return False
        changed = row.held, row.delta_scale
        return changed != (pair in in_force.holds, in_force.scales.get(pair, 1.0))

    def read(self) -> Iterator[Row]:
        """See `Record`."""
        looked_at = 0
        steps = max(self._run.end or 0, 1)
        for number, (found, checksum) in enumerate(self._reader.rows(self._run), 1):
            self.part_read = min(found["step"] / steps, 1.0)
            values = tuple([found[name] for name in FIELDS])
            if tuple(map(type, values)) != TYPES:
                raise UsageError(
                    f"run {self.name}: row {number} of the journal is damaged: it holds {values}"
                )
            held, scale = bool(found.get("held", 0)), found.get("delta_scale", 1.0) or 1.0
            differing = None if checksum == found["crc"] else (found["crc"], checksum)
            more = (held, scale, bool(found["paused"]), number, differing)
            row = Row._make((*values, *more))
            if row.step > looked_at and self._is_new(row):
                looked_at = row.step
                self._read_commands()
            yield row


def _config_file(path: Path) -> Path:
    """Return the folder's config.yaml; UsageError, which knows journals, if it is no run folder."""
    if os.path.isfile(path) and is_sqlite(path):
        raise UsageError(
            f"{path} is a file; name a run folder, or --journal FILE RUN_ID for a journal"
        )
    return config_file(path)
