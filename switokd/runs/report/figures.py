"""The pictures of a report: gap, threshold and modes of a run's pairs, pauses, accuracy.

They are made for one column of a paper (two columns for several runs), in vectors, with one legend,
and can be read in grey: lines differ by style, areas by hatch. Many steps are drawn as groups, so
that a picture of a long run stays small and clear. Matplotlib is imported when the first picture is
drawn.

Not covered: the picture that each run draws at its end (`runs/curves.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from switokd.errors import UsageError
from switokd.runs.report.record import PairRecord, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, TWO_COLUMNS, PAGE_COLUMN = 3.4, 7.0, 3.7
"""Widths in inches: in a paper, and of a column of the page."""
BINS, SHARES = 160, 80
"""At most so many values per line, and so many shares of modes, per column."""
WIDE = 8
"""Largest distance over the smallest one from which on axes are logarithmic."""
LINE_INCHES, STRIP_INCHES, ACCURACY_INCHES, REST_INCHES = 0.85, 0.19, 1.15, 0.62
"""Heights: of a pair's lines, a strip of modes, the accuracies, and of axes and legend."""
INK, GREY, GAP, THRESHOLD = "#111111", "#777777", "#1f5fa8", "#c0392b"
PAUSED, NOT_BETTER, GRID = "#e3a72f", "#e9e9e9", "#d8d8d8"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "hatch.linewidth": 0.4,
    "hatch.color": GREY,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.titlepad": 2.5,
    "pdf.fonttype": 42,  # fonts are embedded as fonts: text can be searched
    "svg.hashsalt": "switokd",  # the same run gives the same bytes
    "path.simplify": True,
}
AREAS = (
    (PAUSED, "////", "expert mode, share of steps"),
    (NOT_BETTER, "...", "G > δ, teacher not better"),
)
"""Modes that are shown as areas: colour, hatch, what they are."""
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "os^Dv*"
COLOURS = ("#1f5fa8", "#c0392b", "#2e7d4f", "#8e5ea2", "#b8860b", "#4d4d4d")

Masks = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""By step: in expert mode; gap too large, but teacher not better."""


@dataclass(frozen=True)
class Bins:
    """Neighbouring steps in groups of equal size."""

    size: int
    starts: NDArray[np.int64]
    """Index of each group's first step."""
    edges: NDArray[np.float64]
    """Where the groups lie on the axis of steps: one more than there are groups."""

    @classmethod
    def of(cls, steps: NDArray[np.int64], most: int) -> Bins:
        """Divide `steps`, at least one, into at most `most` groups."""
        size = -(-len(steps) // most)
        starts = np.arange(0, len(steps), size)
        edges = np.append(steps[starts] - 0.5, steps[-1] + 0.5).astype(np.float64)
        return cls(size, starts, edges)

    @property
    def centres(self) -> NDArray[np.float64]:
        """The middle of each group."""
        return (self.edges[:-1] + self.edges[1:]) / 2

    def mean(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Mean of each group."""
        counts = np.diff(np.append(self.starts, len(values)))
        sums: NDArray[np.float64] = np.add.reduceat(values.astype(np.float64), self.starts)
        return sums / counts

    def range(self, values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Smallest and largest value of each group."""
        return np.minimum.reduceat(values, self.starts), np.maximum.reduceat(values, self.starts)


def picture_of(runs: Sequence[RunRecord]) -> Figure:
    """The whole picture: one column per run with its pairs and modes, accuracies below.

    UsageError if no run has a decision or a tested epoch yet.
    """
    from matplotlib import rc_context

    shown, tested = [run for run in runs if run.pairs], [run for run in runs if _tests(run)]
    if not shown and not tested:
        names = ", ".join(str(run.folder) for run in runs)
        raise UsageError(f"{names}: no decision and no tested epoch yet, so there is no picture")
    columns = [_heights(run) for run in shown]
    heights = [max(map(sum, columns))] if shown else []
    heights += [ACCURACY_INCHES] if tested else []
    is_aligned = len(runs) == 1 and bool(shown)  # then all axes have the same steps
    with rc_context(STYLE):
        figure = _figure(COLUMN if len(shown) < 2 else TWO_COLUMNS, heights)
        grid = figure.add_gridspec(len(heights), max(len(shown), 1), height_ratios=heights)
        for column, run in enumerate(shown):
            # A run with few pairs is drawn larger, so that its column has no empty space.
            rows = len(columns[column])
            own = grid[0, column].subgridspec(rows, 1, height_ratios=columns[column])
            *axes, strip = (figure.add_subplot(own[row, 0]) for row in range(rows))
            _draw_run(run, axes, strip, with_label=not column)
            if len(runs) > 1:
                title = f"$\\bf{{{_bold(run.label)}}}$   {run.pairs[0].name}"
                axes[0].set_title(title, loc="left")
            if is_aligned and tested:
                strip.tick_params(labelbottom=False)
                strip.set_xlabel("")
        _same_heights(figure.axes, [pair for run in shown for pair in run.pairs])
        if tested:
            axis = figure.add_subplot(grid[-1, :])
            _draw_accuracy(axis, tested, len(runs) > 1)
            if is_aligned:
                axis.set_xlim(figure.axes[0].get_xlim())
        _legend(figure)
        _fix_layout(figure, is_aligned)
        return figure


def switching_of(run: RunRecord) -> Figure:
    """Gap, threshold and mode of each pair of a run, and each teacher's pauses.

    The run has at least one decision.
    """
    from matplotlib import rc_context

    heights = _heights(run)
    with rc_context(STYLE):
        figure = _figure(PAGE_COLUMN, heights)
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        axes = [figure.add_subplot(grid[row, 0]) for row in range(len(heights))]
        _draw_run(run, axes[:-1], axes[-1], with_label=True)
        _same_heights(axes, run.pairs)
        _legend(figure)
        return figure


def accuracy_of(runs: Sequence[RunRecord]) -> Figure | None:
    """Test accuracy by step; None if no run has tested yet."""
    from matplotlib import rc_context

    if not (tested := [run for run in runs if _tests(run)]):
        return None
    with rc_context(STYLE):
        figure = _figure(PAGE_COLUMN, [1.9])
        _draw_accuracy(figure.add_subplot(), tested, len(runs) > 1)
        _legend(figure)
        return figure


def _figure(width: float, heights: Iterable[float]) -> Figure:
    # Figure instead of pyplot: pyplot's backend belongs to the calling program or notebook.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, hspace=0.02, wspace=0.03)
    return Figure(figsize=(width, sum(heights) + REST_INCHES), layout=layout)


def _fix_layout(figure: Figure, is_aligned: bool) -> None:
    """Lay the axes out once, and round their places.

    The layout of a nested grid differs in the last digits from call to call, and so would the file.
    is_aligned: all axes begin and end at the same places, because they have the same steps.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    places = [axis.get_position() for axis in figure.axes]
    for axis, place in zip(figure.axes, places, strict=True):
        left = max(each.x0 for each in places) if is_aligned else place.x0
        right = min(each.x1 for each in places) if is_aligned else place.x1
        bounds = left, place.y0, right - left, place.height
        left, bottom, width, height = (round(each, 6) for each in bounds)
        axis.set_position((left, bottom, width, height))


def _heights(run: RunRecord) -> list[float]:
    """The heights of a run's axes: one for each pair, and the strips of modes."""
    return [*[LINE_INCHES] * len(run.pairs), STRIP_INCHES * len(list(_modes(run)))]


def _tests(run: RunRecord) -> list[dict[str, Any]]:
    """The lines of metrics of epochs that ended with a test."""
    return [line for line in run.metrics if line["test_top1"] is not None]


def _bold(text: str) -> str:
    """Text for bold mathematical type, where a space is nothing and a hyphen is a minus sign."""
    escaped = re.sub(r"([_#$%&{}\\^~])", r"\\\1", text)
    return escaped.replace("-", "\N{HYPHEN}").replace(" ", r"\ ")


def _draw_run(run: RunRecord, axes: Sequence[Axes], strip: Axes, with_label: bool) -> None:
    """Draw a run's pairs, one axis each, and below them the modes of pairs and teachers.

    with_label: whether the axes say what they show; columns on the right do not.
    """
    limits = min(int(pair.steps[0]) for pair in run.pairs) - 0.5, run.last_step + 0.5
    for axis, pair in zip(axes, run.pairs, strict=True):
        _draw_pair(axis, pair)
        axis.set_label("pair")
        axis.set_title(pair.name, loc="left")
        axis.set_xlim(limits)
        axis.tick_params(labelbottom=False)
        if with_label:
            axis.set_ylabel("distance")
    _draw_modes(strip, list(_modes(run)))
    for axis in (*axes, strip):
        _mark_whole_steps(axis)
    strip.set_xlim(limits)
    strip.set_xlabel("step")


def _draw_pair(axis: Axes, pair: PairRecord) -> None:
    """Gap and threshold: means of groups of steps, and the gap's range in each group."""
    bins = Bins.of(pair.steps, BINS)
    if bins.size > 1:
        axis.fill_between(bins.centres, *bins.range(pair.gap), color=GAP, alpha=0.2, linewidth=0)
    for values, style, colour, label in (
        (pair.gap, "-", GAP, "gap G"),
        (pair.delta, "--", THRESHOLD, "threshold δ"),
    ):
        axis.plot(bins.centres, bins.mean(values), style, color=colour, linewidth=1, label=label)
    axis.grid(axis="y", color=GRID, linewidth=0.4)
    axis.set_axisbelow(True)


def _same_heights(axes: Sequence[Axes], pairs: Sequence[PairRecord]) -> None:
    """Let all pairs have the same range of distances; logarithmic if it is wide.

    Distances fall as networks learn: a linear axis would not tell a late gap from its threshold.
    """
    from matplotlib.ticker import LogLocator

    means = [Bins.of(p.steps, BINS).mean(values) for p in pairs for values in (p.gap, p.delta)]
    low, high = min(map(np.min, means)), max(map(np.max, means))
    for axis in (axis for axis in axes if axis.get_label() == "pair"):
        if low > 0 and high > WIDE * low:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_ylim(0.85 * low, 1.2 * high)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        else:
            axis.set_ylim(0, 1.08 * high)


def _modes(run: RunRecord) -> Iterator[tuple[str, NDArray[np.int64], Masks]]:
    """Yield name, steps and modes of each teacher, after its pairs if it has several."""
    for teacher in run.teachers:
        pairs = [pair for pair in run.pairs if pair.teacher == teacher.name]
        for pair in pairs if len(pairs) > 1 else ():
            yield f"with {pair.student}", pair.steps, (pair.expert, pair.not_better)
        yield teacher.name, teacher.steps, (teacher.paused, teacher.not_better)


def _draw_modes(axis: Axes, rows: Sequence[tuple[str, NDArray[np.int64], Masks]]) -> None:
    """One strip per row, the first one on top; heights are shares of a group's steps."""
    for place, (_, steps, masks) in enumerate(reversed(rows)):
        bins = Bins.of(steps, SHARES)
        bottom = np.full(len(bins.starts), place + 0.06)
        if not any(mask.any() for mask in masks):
            middle = (bins.edges[0] + bins.edges[-1]) / 2
            axis.text(middle, place + 0.47, "learns in every step", ha="center", va="center")
        for mask, (colour, hatch, label) in zip(masks, AREAS, strict=True):
            top = bottom + 0.88 * bins.mean(mask)
            axis.fill_between(
                bins.edges,
                np.append(bottom, bottom[-1]),
                np.append(top, top[-1]),
                step="post",
                facecolor=colour,
                hatch=hatch,
                linewidth=0,
                label=label,
            )
            bottom = top
    names = [name for name, _, _ in reversed(rows)]
    axis.set_yticks([place + 0.5 for place in range(len(rows))], names)
    axis.set_ylim(0, len(rows))
    axis.tick_params(left=False)
    for place in range(1, len(rows)):
        axis.axhline(place, color=INK, linewidth=0.4)


def _draw_accuracy(axis: Axes, runs: Sequence[RunRecord], with_runs: bool) -> None:
    """A colour and a marker per network, a line style per run.

    with_runs: whether the legend names the runs.
    """
    names = dict.fromkeys(line["network"] for run in runs for line in run.metrics)
    looks = {name: _look(place) for place, name in enumerate(names)}
    for run, style in zip(runs, cycle(LINES), strict=False):
        for name, (colour, marker) in looks.items():
            lines = [line for line in _tests(run) if line["network"] == name]
            steps, top1 = [line["step"] for line in lines], [line["test_top1"] for line in lines]
            look: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "markersize": 2.6,
                "linewidth": 0.9,
            }
            every = max(len(lines) // 12, 1)
            axis.plot(steps, top1, linestyle=style, markevery=every, **look)
            # Networks by colour, runs by style: one entry for each, not one for each line.
            axis.plot([], [], label=name, **look)
        if with_runs:
            axis.plot([], [], linestyle=style, color=INK, linewidth=0.9, label=run.label)
    axis.set_ylabel("test top-1 (%)")
    axis.set_xlabel("step")
    _mark_whole_steps(axis)
    axis.grid(color=GRID, linewidth=0.4)
    axis.set_axisbelow(True)
    axis.margins(x=0.01)


def _mark_whole_steps(axis: Axes) -> None:
    """Let no mark of the axis of steps be a fraction, also in a short run."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _look(place: int) -> tuple[str, str]:
    """Colour and marker of a network; after six networks, the same colours with other markers."""
    return COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def _legend(figure: Figure) -> None:
    """One legend for all axes, above them; each entry once."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper center",
        ncols=2 if figure.get_figwidth() < 5 else 5,
        handlelength=2.2,
        columnspacing=1.2,
        borderpad=0.1,
        labelspacing=0.35,
    )
