"""The picture of a comparison.

matplotlib is imported when the picture is drawn, because the import takes long.

Not covered: the curves of a single run (`runs/curves.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from switokd.runs.compare.statistics import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the top-1 of each student by strategy: one dot per seed, mean and spread below.

    OSError if `path` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    students = [name for name, n in comparison.networks().items() if n["role"] == "student"]
    height = 1.3 + 0.6 * len(comparison.strategies)
    size = (1.5 + 5.5 * len(students), height)
    figure, axes = plt.subplots(
        1, len(students), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, student in zip(axes[0], students, strict=True):
        _draw_student(axis, comparison, student)
    figure.suptitle(f"{comparison.name}: test top-1 after the last epoch", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_student(axis: Axes, comparison: Comparison, student: str) -> None:
    """Draw one student: one line per strategy, from the top in the order of the table."""
    best = comparison.best(student)
    for y, strategy in enumerate(comparison.strategies):
        top1 = comparison.top1(strategy, student)
        if top1 is None:
            continue
        colour = "tab:green" if strategy in best else "tab:blue"
        values = comparison.values(strategy, student)
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
    axis.set_yticks(range(len(comparison.strategies)), comparison.strategies)
    axis.set_ylim(len(comparison.strategies) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(
        f"{student}, {comparison.networks()[student]['parameters']:,} parameters", fontsize=10
    )
    axis.set_xlabel("top-1 (%)  dots: seeds; diamond: mean ± sd; green: highest mean", fontsize=9)
