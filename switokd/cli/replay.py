"""The command `switokd replay`: derives the decisions of a run again. Torch-free.

Not covered: the derivation itself (`runs/replay/`).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from switokd.cli.arguments import Verbose, fail, number_option
from switokd.errors import EXIT_DIFFERS, SwitokdError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from switokd.runs.replay.record import Record
    from switokd.runs.replay.replay import Replay

WIDTH = 120
"""Width of the tables in characters where output is no terminal."""
MOST_PAIRS = 6
"""Most pairs with columns of their own; for more of them, the table has their mean."""
RUN_HELP = "Folder of a run, finished or not; with --journal, the run's id there."
JOURNAL_HELP = "Read the run from a coordinator's journal, also while the coordinator writes it."
DELTA_HELP = (
    "What if: this fixed threshold, from 0 to 2, or a range FROM:TO:STEP. May be given several "
    "times."
)
STRATEGY_HELP = (
    "What if: the rule of this strategy; arguments as NAME:KEY=VALUE[:KEY=VALUE]. May be given "
    "several times, or with commas."
)
SCALE_HELP = "What if: the run's own threshold, multiplied by this. May be given several times."
PICTURE_HELP = "Draw gap, thresholds and modes to this file, as .png, .svg or .pdf."
JSON_HELP = "Print one object of JSON instead of tables."
SHOW_HELP = "Differences to show; all are counted."
EPILOG = (
    "Exit codes: 0 the record follows from its distances bit for bit, 2 a mistake in the arguments "
    "or a record that cannot be read, 7 the record differs."
)


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)],
    journal: Annotated[Optional[Path], typer.Option(metavar="FILE", help=JOURNAL_HELP)] = None,  # noqa: UP045
    delta: Annotated[Optional[list[str]], typer.Option(metavar="X", help=DELTA_HELP)] = None,  # noqa: UP045
    strategy: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Option(metavar="NAME", help=STRATEGY_HELP),
    ] = None,
    scale: Annotated[Optional[list[str]], typer.Option(metavar="F", help=SCALE_HELP)] = None,  # noqa: UP045
    picture: Annotated[Optional[Path], typer.Option(metavar="FILE", help=PICTURE_HELP)] = None,  # noqa: UP045
    show: Annotated[int, number_option(1, help=SHOW_HELP)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    verbose: Verbose = False,
) -> None:
    """Derive every decision of a run again, and say what another rule would do.

    For example:

    switokd replay runs/digits-2t1s-001

    switokd replay --journal journal.db RUN_ID

    switokd replay runs/digits-2t1s-001 --delta 0.2 --delta 0.4:0.8:0.1
    --strategy dml,threshold:delta=0.5 --scale 0.9 --picture what-if.png

    Each number and mode must follow from the recorded distances, bit for bit; each
    difference is named by step, pair and field. Modes that the ranks have settled
    because rounding matters, and those that an operator's command has held, are
    counted apart.

    --delta, --strategy and --scale apply other rules to the recorded distances.
    This is a statement about the recorded numbers, not about how training would
    have gone on: other decisions make other weights, and those other distances.
    """
    from switokd.plugins import add_import_folders
    from switokd.runs.replay.alternatives import alternatives
    from switokd.runs.replay.picture import check_picture, draw
    from switokd.runs.replay.replay import replay as replay_record

    try:
        if picture:
            check_picture(picture)
        deltas, scales = _numbers("--delta", delta), _numbers("--scale", scale)
        record = _record(run, journal)
        add_import_folders(record.import_folders)
        others = alternatives(record.deciding, deltas, strategy or [], scales)
        with _progress(record.name) as on_progress:
            result = replay_record(record, others, show, on_progress)
        if as_json:
            print(json.dumps(result.as_dict()))
        else:
            _print(result)
        if picture:
            draw(result, picture)
            if not as_json:
                print(f"picture    {picture}")
    except SwitokdError as error:
        fail(error)
    if not result.is_exact:
        raise typer.Exit(EXIT_DIFFERS)


def _record(run: str, journal: Path | None) -> Record:
    from switokd.runs.replay.record import FolderRecord, JournalRecord

    return JournalRecord(journal, run) if journal else FolderRecord(Path(run))


def _numbers(option: str, texts: list[str] | None) -> list[float]:
    return [number for text in texts or [] for number in _range(option, text)]


def _range(option: str, text: str) -> list[float]:
    """A number, or the numbers of FROM:TO:STEP with both ends; UsageError for anything else."""
    allowed = f"{option} {text}: write a number, or FROM:TO:STEP like 0.2:0.8:0.1"
    parts = text.split(":")
    if not all(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", part) for part in parts):
        raise UsageError(allowed)
    numbers = [float(part) for part in parts]
    if len(numbers) == 1:
        return numbers
    if len(numbers) != 3 or not (numbers[2] > 0 and numbers[0] <= numbers[1]):
        raise UsageError(allowed)
    start, end, step = numbers
    count = (end - start) / step
    if count > 1000:
        raise UsageError(f"{allowed}; this range has more than 1000 numbers")
    # Rounded, so that 0.2 + 0.1 is 0.3; the end belongs to the range in spite of rounding.
    return [round(start + i * step, 12) for i in range(math.floor(count + 1e-9) + 1)]


@contextmanager
def _progress(name: str) -> Iterator[Callable[[float], object] | None]:
    """Show on a terminal how much of a long record was read."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"replaying {name}", total=1.0)
        yield lambda part: bar.update(task, completed=part)


def _print(result: Replay) -> None:
    """Print what differs, what was counted apart, and what the other rules would do."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    deciding, pairs = result.deciding, result.deciding.topology.pairs
    semantics = "" if deciding.semantics == "paper" else f", semantics {deciding.semantics}"
    console.print(
        f"{result.name}: {deciding.topology.name}, {deciding.strategy}{semantics}; "
        f"{result.recorded.steps:,} steps with {len(pairs)} pair{'s' * (len(pairs) > 1)}",
        markup=False,
    )
    if result.difference_count:
        _print_differences(console, result)
    else:
        console.print("every decision follows from the recorded distances, bit for bit")
    for line in _counted_apart(result):
        console.print(line, markup=False)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    if result.alternatives:
        _print_alternatives(console, result)


def _print_differences(console: Console, result: Replay) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="recorded otherwise than derived")
    for heading in ("step", "teacher", "student", "field", "recorded", "derived", result.place):
        is_number = heading in ("step", result.place)
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for each in result.differences:
        cells = (
            *(f"{each.step}", each.teacher, each.student, each.field),
            *("-" if value is None else str(value) for value in (each.recorded, each.derived)),
            "-" if each.place is None else f"{each.place}",
        )
        table.add_row(*map(Text, cells))
    console.print(table, soft_wrap=False)
    count, more = result.difference_count, result.difference_count - len(result.differences)
    shown = f"; {more:,} of them are not shown (--show N)" if more else ""
    console.print(f"{count:,} difference{'s' * (count > 1)}{shown}")


def _counted_apart(result: Replay) -> Iterator[str]:
    """Sentences on rows that are no differences."""
    if count := len(result.rounded):
        steps = ", ".join(f"{r.step} ({r.teacher}, {r.student})" for r in result.rounded[:5])
        more = f" and {count - 5} more" if count > 5 else ""
        yield (
            f"{count} mode{'s' * (count > 1)} settled by the ranks, where rounding decides: step "
            f"{steps}{more}"
        )
    if result.held:
        yield f"{result.held:,} modes held by an operator's command: they follow the record"
    if result.scaled:
        yield f"{result.scaled:,} thresholds scaled by an operator's command"


def _print_alternatives(console: Console, result: Replay) -> None:
    from rich.table import Table
    from rich.text import Text

    from switokd.runs.replay.alternatives import STATEMENT

    rows = [tally.as_dict() for tally in (result.recorded, *result.alternatives)]
    pairs, teachers = result.deciding.topology.pairs, result.deciding.topology.teachers
    is_wide = len(pairs) > MOST_PAIRS
    table = Table(title="share of the steps under each rule", caption=STATEMENT)
    table.add_column("rule", overflow="fold")
    columns = ["all pairs"] if is_wide else [f"{p.teacher}\n{p.student}" for p in pairs]
    for name in columns:
        table.add_column(Text(f"expert\n{name}"), justify="right")
    for name in ["all teachers"] if is_wide else teachers:
        table.add_column(Text(f"paused\n{name}"), justify="right")
    table.add_column("mode\nswitches", justify="right")
    table.add_column("differs\nfrom record", justify="right")
    for row in rows:
        expert, paused = list(row["expert"].values()), list(row["paused"].values())
        if is_wide:
            expert, paused = [sum(expert) / len(expert)], [sum(paused) / len(paused)]
        table.add_row(
            Text(row["label"]),
            *(f"{share:.1%}" for share in (*expert, *paused)),
            f"{sum(row['switches'].values()):,}",
            f"{row['differing']:.1%}",
        )
    console.print(table, soft_wrap=False)
