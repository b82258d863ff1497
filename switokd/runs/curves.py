"""The picture of a run, curves.png: gap, threshold and modes of each pair, test accuracy.

Imported without torch, so that a process beside the ranks can draw.

Not covered: the closing table (`summary.py`), live metrics (`training/meters.py`), the picture of
a comparison (`compare/plot.py`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switokd.runs.json_lines import read_lines
from switokd.runtime.interpreter import python_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXPERT_SHADE, NOT_BETTER_SHADE = "#f8dd9e", "#ececec"


def draw_curves(folder: Path) -> Path:
    """Draw curves.png from decisions.jsonl and metrics.jsonl of a run folder; return its path."""
    # Figure instead of pyplot: pyplot's backend belongs to the calling program or notebook.
    from matplotlib.figure import Figure

    decisions = read_lines(folder / "decisions.jsonl")
    metrics = read_lines(folder / "metrics.jsonl")
    decisions.sort(key=lambda d: (d["teacher"], d["student"], d["step"]))
    pairs = [(k, list(g)) for k, g in groupby(decisions, lambda d: (d["teacher"], d["student"]))]
    rows = len(pairs) + 1
    figure = Figure(figsize=(11, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    for axis, ((teacher, student), lines) in zip(axes[:-1], pairs, strict=True):
        _draw_pair(axis, lines)
        paused = sum(d["mode"] == "expert" for d in lines) / len(lines)
        axis.set_title(
            f"{teacher} and {student}: expert mode in {paused:.0%} of the steps", fontsize=10
        )
    _draw_accuracy(axes[-1], metrics)
    axes[-1].set_xlabel("step")
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    return path


@contextmanager
def drawing_process() -> Iterator[Callable[[Path], None]]:
    """Start a process that draws curves; yield a function that names the run folder to it.

    The process imports Matplotlib while the caller trains. The end of the block waits until the
    curves are drawn. CalledProcessError if drawing fails.
    """
    command = python_command("switokd.runs.curves")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True, text=True
    ) as child:
        try:
            yield lambda folder: _send(child, folder)
        except BaseException:
            child.kill()
            raise
        child.communicate()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)


def _send(child: subprocess.Popen[str], folder: Path) -> None:
    assert child.stdin is not None
    child.stdin.write(str(folder.absolute()))
    child.stdin.close()


def _draw_pair(axis: Axes, lines: list[dict[str, Any]]) -> None:
    steps = [d["step"] for d in lines]
    # Thin lines show the steps, thick lines a running mean for the trend.
    for key, label, colour in (("gap", "gap G", "tab:blue"), ("delta", "threshold δ", "tab:red")):
        values = [d[key] for d in lines]
        axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.7)
        axis.plot(steps, _smooth(values), color=colour, linewidth=1.5, label=label)
    above_threshold = [d["gap"] > d["delta"] for d in lines]
    expert = [d["mode"] == "expert" for d in lines]
    teacher_not_better = [a and not e for a, e in zip(above_threshold, expert, strict=True)]
    _shade(axis, steps, expert, EXPERT_SHADE, "expert mode: G > δ, $e_t < e_s$")
    _shade(axis, steps, teacher_not_better, NOT_BETTER_SHADE, "G > δ, but teacher not better")
    axis.set_ylabel("L1 distance")
    _legend(axis)


def _shade(axis: Axes, steps: list[int], where: list[bool], colour: str, label: str) -> None:
    """Shade the steps for which `where` is true, from half a step before to half a step after."""
    edges = [steps[0] - 0.5, *(s + 0.5 for s in steps)]
    axis.fill_between(
        edges,
        0,
        1,
        where=[*where, where[-1]],
        transform=axis.get_xaxis_transform(),
        step="post",
        color=colour,
        linewidth=0,
        label=label,
        zorder=0,
    )


def _legend(axis: Axes) -> None:
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _draw_accuracy(axis: Axes, metrics: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(line["network"] for line in metrics):
        of_network = [line for line in metrics if line["network"] == name]
        style = "-" if of_network[0]["role"] == "student" else "--"
        lines = [line for line in of_network if line["test_top1"] is not None]
        steps, accuracy = [m["step"] for m in lines], [m["test_top1"] for m in lines]
        axis.plot(steps, accuracy, style, marker=".", label=name)
    axis.set_ylabel("test top-1 (%)")
    if metrics:
        _legend(axis)
    axis.grid(alpha=0.3)


def _smooth(values: list[float], half: int = 10) -> list[float]:
    """Running mean over `half` neighbours on each side."""
    windows = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


if __name__ == "__main__":
    import matplotlib.figure  # noqa: F401 while the run goes on

    if name := sys.stdin.read():
        draw_curves(Path(name))
