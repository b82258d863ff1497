"""The table of a comparison, for terminals and for Markdown.

Not covered: the CSV file (`files.py`), the statistics (`statistics.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from switokd.runs.compare.statistics import Comparison

WIDTH_OF_NETWORKS, WIDTH_OF_STRATEGY = 42, 15
"""Characters that the first three columns and each strategy's column take in a terminal."""


@dataclass(frozen=True)
class TableRow:
    """One row of the table."""

    cells: tuple[str, ...]
    bold: frozenset[int] = frozenset()
    """Indices of the cells with a student's best result."""


def headings(comparison: Comparison) -> list[str]:
    """Headings of the table's columns."""
    return ["network", "role", "parameters", *comparison.strategies]


def rows(comparison: Comparison) -> tuple[list[TableRow], list[TableRow]]:
    """Rows of the table: one per network, and one per kind of cost."""
    networks = []
    for name, network in comparison.networks().items():
        best = comparison.best(name) if network["role"] == "student" else set()
        bold = (3 + i for i, strategy in enumerate(comparison.strategies) if strategy in best)
        top1 = (str(comparison.top1(strategy, name) or "-") for strategy in comparison.strategies)
        cells = (name, network["role"], f"{network['parameters']:,}", *top1)
        networks.append(TableRow(cells, frozenset(bold)))
    costs = [
        TableRow(
            (heading, "", "", *(cell(comparison, strategy) for strategy in comparison.strategies))
        )
        for heading, cell in (
            ("teachers paused", _paused_cell),
            ("wall time", _wall_cell),
            ("compute saved", _saved_cell),
            ("finished runs", _runs_cell),
        )
    ]
    return networks, costs


def _paused_cell(comparison: Comparison, strategy: str) -> str:
    share = comparison.paused_share(strategy)
    return "-" if share is None else f"{share:.1%}"


def _wall_cell(comparison: Comparison, strategy: str) -> str:
    seconds = comparison.wall_seconds(strategy)
    return "-" if seconds is None else duration(seconds)


def _saved_cell(comparison: Comparison, strategy: str) -> str:
    saved = comparison.saved(strategy)
    if saved is None:
        return "-"
    seconds, share = saved
    return duration(seconds) + (f" ({share:.0%})" if share is not None else "")


def _runs_cell(comparison: Comparison, strategy: str) -> str:
    results = comparison.of_strategy(strategy)
    finished, failed = len(comparison.finished(strategy)), sum(bool(r.failure) for r in results)
    cell = f"{finished}" if finished == len(results) else f"{finished} of {len(results)}"
    return cell + (f", {failed} failed" if failed else "")


def duration(seconds: float) -> str:
    """Format a duration, for example "4.2 s", "12.0 min" or "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def caption(comparison: Comparison) -> str:
    """Explain the numbers of the table in a paragraph."""
    seeds = ", ".join(map(str, comparison.seeds))
    spread = " ± sample standard deviation over seeds" if len(comparison.seeds) > 1 else ""
    return (
        f"Top-1 after the last epoch in percent, mean{spread}; seed{'s' * bool(spread)} {seeds}. "
        "Bold: best strategy for a student. Teachers paused: share of the teachers' steps. Wall "
        "time: mean of a run. Compute saved: device-seconds of the teachers' backward passes and "
        "optimizer steps that pauses saved per run, and their share of the total without pauses."
    )


def failures(comparison: Comparison) -> list[str]:
    """One line per failed run."""
    return [
        f"failed: {result.strategy}, seed {result.seed}: {result.failure}"
        for result in comparison.results
        if result.failure
    ]


def rich_table(comparison: Comparison, width: int = 1000) -> Table:
    """The table for a terminal of `width` characters.

    Strategies become rows if their columns do not fit.
    """
    if WIDTH_OF_NETWORKS + WIDTH_OF_STRATEGY * len(comparison.strategies) > width:
        return _strategies_as_rows(comparison)
    table = Table(title=f"{comparison.name}: top-1 in percent")
    for i, heading in enumerate(headings(comparison)):
        is_text, is_strategy = i < 2, i > 2
        table.add_column(
            Text(heading.replace(":", ":\n")),
            justify="left" if is_text else "right",
            no_wrap=not is_strategy,
            overflow="fold",
        )
    for section in rows(comparison):
        for row in section:
            styles = ("bold" if i in row.bold else "" for i in range(len(row.cells)))
            table.add_row(*map(Text, row.cells, styles))
        table.add_section()
    return table


def _strategies_as_rows(comparison: Comparison) -> Table:
    networks, costs = rows(comparison)
    table = Table(title=f"{comparison.name}: top-1 in percent")
    table.add_column("strategy", overflow="fold")
    for row in networks:
        name, role, parameters = row.cells[:3]
        table.add_column(Text(f"{name}\n{role}\n{parameters}"), justify="right", no_wrap=True)
    for row in costs:
        table.add_column(row.cells[0].split()[-1], justify="right")  # paused, time, saved, runs
    for i, strategy in enumerate(comparison.strategies, 3):
        cells = (Text(row.cells[i], "bold" if i in row.bold else "") for row in [*networks, *costs])
        table.add_row(Text(strategy), *cells)
    return table


def markdown(comparison: Comparison, notes: Iterable[str] = ()) -> str:
    """The table in Markdown, with its caption, the failures and the notes."""
    lines = [headings(comparison), ["---", "---", *["---:"] * (1 + len(comparison.strategies))]]
    lines += [
        [f"**{cell}**" if i in row.bold else cell for i, cell in enumerate(row.cells)]
        for section in rows(comparison)
        for row in section
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    paragraphs = [f"# {comparison.name}", table, caption(comparison), *failures(comparison), *notes]
    return "\n\n".join(paragraphs) + "\n"
