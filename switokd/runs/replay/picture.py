"""The picture of a replay: gap and thresholds of each pair, and the modes under every rule.

Colours are shades of grey or differ in brightness and line style, so that a print can be read.

Not covered: the run's own curves with its accuracy (`runs/curves.py`).
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from switokd.errors import UsageError
from switokd.runs.replay.alternatives import STATEMENT, Bin, ReplayCount
from switokd.runs.replay.replay import Replay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 6
"""Most alternatives whose thresholds are drawn; with more of them, no line could be followed."""
STYLES = ("--", ":", "-.", (0, (9, 2, 1, 2, 1, 2)), (0, (1, 3)), (0, (14, 3)))
"""Line styles of the alternatives."""
FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """UsageError if the name of a picture has no known ending, or its folder does not exist."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--picture {path}: the name must end with {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--picture {path}: there is no folder {path.parent}")


def draw(replay: Replay, path: Path) -> None:
    """Draw a replay to a file whose name tells the format. UsageError if it cannot be written."""
    # Figure instead of pyplot: pyplot's backend belongs to the calling program or notebook.
    from matplotlib.figure import Figure

    check_picture(path)
    if not replay.recorded.steps:
        raise UsageError(f"--picture {path}: the record has no whole step to draw")
    tallies = [replay.recorded, *replay.alternatives]
    pairs = replay.deciding.topology.pairs
    bar = 0.26 * len(tallies)
    heights = [height for _ in pairs for height in (1.9, bar)]
    size = (11, sum(heights) + 0.42 * len(pairs) + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        2 * len(pairs), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    edges = _edges(replay)
    for i, pair in enumerate(pairs):
        above, below = axes[2 * i], axes[2 * i + 1]
        above.set_title(f"{pair.teacher} and {pair.student}", fontsize=10, loc="left")
        _draw_distances(above, tallies, i, edges)
        _draw_modes(below, tallies, i, edges)
    axes[-1].set_xlabel("step")
    axes[-1].set_xlim(edges[0], edges[-1])
    _legend(axes[0], figure)
    deciding = replay.deciding
    title = f"{replay.name}: {deciding.topology.name}, {deciding.strategy}"
    axes[0].set_title(title, fontsize=9, loc="right", color="0.35")
    if replay.alternatives:
        figure.supxlabel(STATEMENT, fontsize=8, color="0.35")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UsageError(f"--picture {path}: {error.strerror}") from None


def _edges(replay: Replay) -> list[float]:
    """Steps at which the bins begin, and the end of the last one."""
    first = replay.first_step
    return [
        first - 0.5 + steps
        for steps in accumulate((b.steps for b in replay.recorded.bins), initial=0)
    ]


def _draw_distances(axis: Axes, tallies: list[ReplayCount], pair: int, edges: list[float]) -> None:
    """Draw a pair's gap, and its threshold under each rule; means over the steps of a bin."""
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    recorded = tallies[0].bins
    axis.plot(
        middles,
        _means([b.gap[pair] for b in recorded], recorded),
        color="0.6",
        linewidth=0.9,
        label="gap G",
    )
    axis.plot(
        middles,
        _means([b.delta[pair] for b in recorded], recorded),
        color="black",
        linewidth=1.2,
        label="threshold δ, recorded",
    )
    if len(tallies) - 1 <= MOST_LINES:
        own = [b.delta for b in recorded]
        others = [t for t in tallies[1:] if [b.delta for b in t.bins] != own]
        for style, tally in zip(STYLES, others, strict=False):
            axis.plot(
                middles,
                _means([b.delta[pair] for b in tally.bins], tally.bins),
                color="tab:red",
                linestyle=style,
                linewidth=1.2,
                label=f"δ, {tally.label}",
            )
    axis.set_ylabel("L1 distance")
    axis.margins(y=0.08)
    axis.grid(alpha=0.25)


def _means(sums: list[float], bins: list[Bin]) -> list[float]:
    return [total / b.steps for total, b in zip(sums, bins, strict=True)]


def _draw_modes(axis: Axes, tallies: list[ReplayCount], pair: int, edges: list[float]) -> None:
    """Draw one row per rule: the darker, the more of the steps are in expert mode."""
    shares = [[b.expert[pair] / b.steps for b in tally.bins] for tally in tallies]
    rows = range(len(tallies) + 1)
    axis.pcolormesh(edges, rows, shares, cmap="Greys", vmin=0, vmax=1, rasterized=True)
    axis.set_yticks([row + 0.5 for row in rows[:-1]], [t.label for t in tallies], fontsize=8)
    axis.set_ylim(len(tallies), 0)
    for row in rows[1:-1]:
        axis.axhline(row, color="0.75", linewidth=0.8)
    right = axis.secondary_yaxis("right")
    labels = [f"{t.expert[pair] / t.steps:.0%}" for t in tallies]
    right.set_yticks([row + 0.5 for row in rows[:-1]], labels, fontsize=8)
    right.tick_params(length=0)


def _legend(axis: Axes, figure: object) -> None:
    """One legend for all pairs, above them."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    assert isinstance(figure, Figure)
    handles, labels = axis.get_legend_handles_labels()
    for colour, label in (("black", "expert mode (its share: right)"), ("white", "learning mode")):
        handles.append(Patch(facecolor=colour, edgecolor="0.5"))
        labels.append(label)
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
