"""The table of a comparison, for terminals, Markdown and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from switokd.errors import UsageError
from switokd.runs.compare.plot import draw
from switokd.runs.compare.statistics import Comparison, _saving, _summary

WIDTH_OF_NETWORKS, WIDTH_OF_STRATEGY = 42, 15
"""Characters of a terminal that the table's first columns take, and each strategy's."""


COLUMNS = (
    "strategy",
    "seed",
    "network",
    "role",
    "top1_last",
    "top1_best",
    "steps",
    "steps_paused",
    "wall_seconds",
    "parameters",
    "saved_device_seconds",
    "teachers_device_seconds",
)
"""Of compare.csv; the last two, like wall_seconds, are the whole run's."""


@dataclass(frozen=True)
class TableRow:
    """A line of the table."""

    cells: tuple[str, ...]
    bold: frozenset[int] = frozenset()
    """Which of the cells are a student's best."""


def headings(found: Comparison) -> list[str]:
    """The table's first line."""
    return ["network", "role", "parameters", *found.strategies]


def rows(found: Comparison) -> tuple[list[TableRow], list[TableRow]]:
    """The table's lines: one per network; then what each strategy cost."""
    networks = []
    for name, network in found.networks().items():
        best = found.best(name) if network["role"] == "student" else set()
        bold = (3 + i for i, strategy in enumerate(found.strategies) if strategy in best)
        top1 = (str(found.top1(strategy, name) or "-") for strategy in found.strategies)
        cells = (name, network["role"], f"{network['parameters']:,}", *top1)
        networks.append(TableRow(cells, frozenset(bold)))
    costs = [
        TableRow((heading, "", "", *(cell(found, strategy) for strategy in found.strategies)))
        for heading, cell in (
            ("teachers paused", _paused_cell),
            ("wall time", _wall_cell),
            ("compute saved", _saved_cell),
            ("finished runs", _runs_cell),
        )
    ]
    return networks, costs


def _paused_cell(found: Comparison, strategy: str) -> str:
    share = found.paused_share(strategy)
    return "-" if share is None else f"{share:.1%}"


def _wall_cell(found: Comparison, strategy: str) -> str:
    seconds = found.wall_seconds(strategy)
    return "-" if seconds is None else duration(seconds)


def _saved_cell(found: Comparison, strategy: str) -> str:
    saved = found.saved(strategy)
    if saved is None:
        return "-"
    seconds, share = saved
    return duration(seconds) + (f" ({share:.0%})" if share is not None else "")


def _runs_cell(found: Comparison, strategy: str) -> str:
    of_it = [run for run in found.runs if run.strategy == strategy]
    finished = sum(run.summary is not None for run in of_it)
    failed = sum(bool(run.failure) for run in of_it)
    words = f"{finished}" if finished == len(of_it) else f"{finished} of {len(of_it)}"
    return words + (f", {failed} failed" if failed else "")


def duration(seconds: float) -> str:
    """A time as people read it: "4.2 s", "12 min", "1.5 h"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def caption(found: Comparison) -> str:
    """What the table's numbers are, in a sentence."""
    seeds = ", ".join(map(str, found.seeds))
    spread = " ± sample standard deviation over seeds" if len(found.seeds) > 1 else ""
    return (
        f"Top-1 after the last epoch in percent, mean{spread}; seed{'s' * bool(spread)} {seeds}. "
        "Bold: each student's best strategy. Teachers paused: share of their steps. Wall time: "
        "mean of a run. Compute saved: device-seconds of the teachers' backward passes and updates "
        "that a run's pauses spared, and their share of what these would have taken."
    )


def failures(found: Comparison) -> list[str]:
    """A line for each run that failed."""
    return [f"failed: {r.strategy}, seed {r.seed}: {r.failure}" for r in found.runs if r.failure]


def rich_table(found: Comparison, width: int = 1000) -> Table:
    """The table for a terminal of `width` characters; strategies are rows where they are many."""
    if WIDTH_OF_NETWORKS + WIDTH_OF_STRATEGY * len(found.strategies) > width:
        return _strategies_as_rows(found)
    table = Table(title=f"{found.name}: top-1 in percent")
    for i, heading in enumerate(headings(found)):
        is_text, is_strategy = i < 2, i > 2
        table.add_column(
            Text(heading.replace(":", ":\n")),
            justify="left" if is_text else "right",
            no_wrap=not is_strategy,
            overflow="fold",
        )
    for section in rows(found):
        for row in section:
            styles = ("bold" if i in row.bold else "" for i in range(len(row.cells)))
            table.add_row(*map(Text, row.cells, styles))
        table.add_section()
    return table


def _strategies_as_rows(found: Comparison) -> Table:
    networks, costs = rows(found)
    table = Table(title=f"{found.name}: top-1 in percent")
    table.add_column("strategy", overflow="fold")
    for row in networks:
        name, role, parameters = row.cells[:3]
        table.add_column(Text(f"{name}\n{role}\n{parameters}"), justify="right", no_wrap=True)
    for row in costs:
        table.add_column(row.cells[0].split()[-1], justify="right")  # paused, time, saved, runs
    for i, strategy in enumerate(found.strategies, 3):
        cells = (Text(row.cells[i], "bold" if i in row.bold else "") for row in [*networks, *costs])
        table.add_row(Text(strategy), *cells)
    return table


def markdown(found: Comparison, notes: Iterable[str] = ()) -> str:
    """The table with its caption, failures and notes."""
    lines = [headings(found), ["---", "---", *["---:"] * (1 + len(found.strategies))]]
    lines += [
        [f"**{cell}**" if i in row.bold else cell for i, cell in enumerate(row.cells)]
        for section in rows(found)
        for row in section
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    paragraphs = [f"# {found.name}", table, caption(found), *failures(found), *notes]
    return "\n\n".join(paragraphs) + "\n"


def csv_rows(found: Comparison) -> list[dict[str, Any]]:
    """A row per finished run and network, with the keys of `COLUMNS`."""
    result = []
    for run in found.finished():
        saved, spent = _saving(run)
        for name, network in _summary(run)["networks"].items():
            kept = {key: network[key] for key in COLUMNS if key in network}
            result.append(
                {
                    "strategy": run.strategy,
                    "seed": run.seed,
                    "network": name,
                    **kept,
                    "wall_seconds": _summary(run)["wall_seconds"],
                    "saved_device_seconds": saved,
                    "teachers_device_seconds": spent,
                }
            )
    return result


def save(found: Comparison, out: Path, notes: Iterable[str] = ()) -> list[Path]:
    """Write table.md, compare.csv and compare.png to `out`; UsageError if that cannot be."""
    paths = [out / "table.md", out / "compare.csv", out / "compare.png"]
    try:
        paths[0].write_text(markdown(found, notes), encoding="utf-8")
        with paths[1].open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(csv_rows(found))
        draw(found, paths[2])
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written: {error.strerror}") from None
    return paths
