"""What came out of a comparison: the runs' summaries, their statistics, table, csv and picture.

Torch-free. Spreads are sample standard deviations (n - 1) over seeds.

Not covered: which runs there are (`trials.py`), running them (`trial_runner.py`); whether a
difference between strategies is more than chance.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from switokd.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
class Run:
    """One trial as it stands."""

    strategy: str
    seed: int
    summary: Mapping[str, Any] | None
    """What summary.json holds; None if it is not finished."""
    failure: str = ""
    """Why it ended, if it failed."""


@dataclass(frozen=True)
class Statistic:
    """Mean and spread over seeds."""

    mean: float
    spread: float | None
    """Sample standard deviation; None of a single value."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Of one value or more."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.spread:.2f}" if self.spread is not None else "")


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    cells: tuple[str, ...]
    bold: frozenset[int] = frozenset()
    """Which of the cells are a student's best."""


def read_summary(folder: Path) -> dict[str, Any] | None:
    """A run's summary.json; None if the run has not written it to its end."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("networks") else None


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison. UsageError if none is finished."""

    name: str
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        if not self.finished():
            raise UsageError(f"{self.name}: no run is finished, so there is nothing to compare")

    @property
    def strategies(self) -> list[str]:
        """Labels, in the order in which they were asked for."""
        return list(dict.fromkeys(run.strategy for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """All seeds, finished or not."""
        return sorted({run.seed for run in self.runs})

    def finished(self, strategy: str | None = None) -> list[Run]:
        """Runs that have a summary, of one strategy or of all."""
        of_it = (run for run in self.runs if strategy in (None, run.strategy))
        return [run for run in of_it if run.summary]

    def networks(self) -> dict[str, Mapping[str, Any]]:
        """A finished run's networks by name: role, parameters."""
        return dict(_summary(self.finished()[0])["networks"])

    def values(self, strategy: str, network: str, key: str = "top1_last") -> list[float]:
        """One number of a network, by seed."""
        return [_summary(run)["networks"][network][key] for run in self.finished(strategy)]

    def top1(self, strategy: str, network: str) -> Statistic | None:
        """Top-1 of the last epoch in percent; None if no run is finished."""
        values = self.values(strategy, network)
        return Statistic.of(values) if values else None

    def best(self, network: str) -> set[str]:
        """Strategies with the highest mean top-1 of a network, as the table rounds it."""
        found = {s: self.top1(s, network) for s in self.strategies}
        means = {s: round(t.mean, 2) for s, t in found.items() if t}
        return {s for s, top1 in means.items() if top1 == max(means.values())}

    def paused_share(self, strategy: str) -> float | None:
        """Share of all teachers' steps that were paused, 0 to 1."""
        teachers = [
            network
            for run in self.finished(strategy)
            for network in _summary(run)["networks"].values()
            if network["role"] == "teacher"
        ]
        steps = sum(network["steps"] for network in teachers)
        return sum(network["steps_paused"] for network in teachers) / steps if steps else None

    def wall_seconds(self, strategy: str) -> float | None:
        """Mean duration of a run."""
        seconds = [_summary(run)["wall_seconds"] for run in self.finished(strategy)]
        return mean(seconds) if seconds else None

    def saved(self, strategy: str) -> tuple[float, float | None] | None:
        """Device-seconds that pauses spared the teachers of a run, on average; their share, 0 to 1.

        The share is of what their backward passes and updates would have taken without pauses;
        None where a run has not recorded what they took. None altogether where a run could not
        tell: a teacher that never learned (kd) shows no cost of a step.
        """
        runs = [_saving(run) for run in self.finished(strategy)]
        saved = [s for s, _ in runs if s is not None]
        if not runs or len(saved) < len(runs):
            return None
        spent = [s for _, s in runs if s is not None]
        whole = sum(saved) + sum(spent)
        share = sum(saved) / whole if len(spent) == len(runs) and whole > 0 else None
        return mean(saved), share


def _summary(run: Run) -> Mapping[str, Any]:
    assert run.summary is not None, "only asked of finished runs"
    return run.summary


def _saving(run: Run) -> tuple[float | None, float | None]:
    """Device-seconds that a run's pauses saved, and that its teachers' learning took."""
    found = _summary(run).get("saved_by_pauses") or {}
    return found.get("device_seconds"), found.get("teachers_device_seconds")


def headings(found: Comparison) -> list[str]:
    """The table's first line."""
    return ["network", "role", "parameters", *found.strategies]


def rows(found: Comparison) -> tuple[list[Row], list[Row]]:
    """The table's lines: one per network; then what each strategy cost."""
    networks = []
    for name, network in found.networks().items():
        best = found.best(name) if network["role"] == "student" else set()
        bold = (3 + i for i, strategy in enumerate(found.strategies) if strategy in best)
        top1 = (str(found.top1(strategy, name) or "-") for strategy in found.strategies)
        cells = (name, network["role"], f"{network['parameters']:,}", *top1)
        networks.append(Row(cells, frozenset(bold)))
    costs = [
        Row((heading, "", "", *(cell(found, strategy) for strategy in found.strategies)))
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


def draw(found: Comparison, path: Path) -> None:
    """Draw each student's top-1 by strategy: seeds as dots, mean and spread beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    students = [name for name, n in found.networks().items() if n["role"] == "student"]
    height = 1.3 + 0.6 * len(found.strategies)
    size = (1.5 + 5.5 * len(students), height)
    figure, axes = plt.subplots(
        1, len(students), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, student in zip(axes[0], students, strict=True):
        _draw_student(axis, found, student)
    figure.suptitle(f"{found.name}: test top-1 after the last epoch", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_student(axis: Axes, found: Comparison, student: str) -> None:
    """One student: a line per strategy, from the top in the table's order."""
    best = found.best(student)
    for y, strategy in enumerate(found.strategies):
        top1 = found.top1(strategy, student)
        if top1 is None:
            continue
        colour = "tab:green" if strategy in best else "tab:blue"
        values = found.values(strategy, student)
        axis.plot(values, [y + 0.18] * len(values), "o", color=colour, alpha=0.5, markersize=5)
        axis.errorbar(
            top1.mean, y - 0.1, xerr=top1.spread, fmt="D", color=colour, markersize=6, capsize=4
        )
        axis.annotate(
            str(top1),
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color=colour,
        )
    axis.set_yticks(range(len(found.strategies)), found.strategies)
    axis.set_ylim(len(found.strategies) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(
        f"{student}, {found.networks()[student]['parameters']:,} parameters", fontsize=10
    )
    axis.set_xlabel("top-1 (%)  dots: seeds; diamond: mean ± sd; green: highest mean", fontsize=9)
