"""Pictures for a paper: size, fonts, one legend, marks that can be told apart in grey; long runs.

Not covered: whether they please; they were looked at.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from switokd.config.run_file import load
from switokd.errors import UsageError
from switokd.runs.report import figures
from switokd.runs.report.figures import BINS, Bins, picture_of
from switokd.runs.report.files import write_report
from switokd.runs.report.record import PairRecord, RunRecord
from tests.runs.report.test_report import finished

__all__ = ["finished"]


def pair(teacher: str, student: str, steps: int, seed: int = 0) -> PairRecord:
    """A pair whose gap falls, in all three states."""
    draw = np.random.default_rng(seed)
    gap = np.linspace(1, 0.1, steps) * draw.uniform(0.8, 1.2, steps)
    delta = np.linspace(1, 0.1, steps)
    better = draw.random(steps) < 0.5
    return PairRecord(
        teacher, student, np.arange(1, steps + 1), gap, delta, (gap > delta) & better, better
    )


def record(recipe: str, steps: int, label: str = "run") -> RunRecord:
    config = load(recipe)
    pairs = [pair(p.teacher, p.student, steps, i) for i, p in enumerate(config.topology.pairs)]
    metrics = [
        {"epoch": e, "step": e * steps // 4, "network": name, "test_top1": 50.0 + e + i}
        for e in range(1, 5)
        for i, name in enumerate(config.networks)
    ]
    return RunRecord(label, Path(label), config, "stopped", None, metrics, pairs, [], [], [], 0)


def test_a_picture_is_as_wide_as_a_column_and_has_one_legend() -> None:
    one, several = record("digits-2t1s", 900), record("digits-1t2s", 400, "b_2 50%")
    for runs, width in (([one], figures.COLUMN), ([one, several], figures.TWO_COLUMNS)):
        figure = picture_of(runs)
        assert figure.get_figwidth() == width
        assert len(figure.legends) == 1
        assert not [axis for axis in figure.axes if axis.get_legend()]
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(labels) == len(set(labels))
        assert {"gap G", "threshold δ", "teacher1", "student"} <= set(labels)


def ink(recipe: str) -> Any:
    """A picture as an array of grey values."""
    file = io.BytesIO()
    picture_of([record(recipe, 900)]).savefig(file, format="png", dpi=100)
    return np.asarray(Image.open(file).convert("L"))


@pytest.mark.parametrize("recipe", ["digits-1t1s", "digits-2t1s", "digits-1t2s"])
def test_a_picture_has_no_empty_space(recipe: str) -> None:
    dark = ink(recipe) < 200
    for axis, size in ((1, dark.shape[0]), (0, dark.shape[1])):
        (places,) = np.nonzero(dark.any(axis=axis))
        assert places[0] <= 8
        assert size - places[-1] <= 10
    (rows,) = np.nonzero(dark.any(axis=1))
    assert np.diff(rows).max() < 30, "an empty stripe of a third of an inch"


def test_runs_with_few_pairs_fill_their_column() -> None:
    """A run beside one with more pairs is drawn larger: there is no hole below it."""
    few, many = record("digits-1t1s", 900, "few-pairs"), record("digits-2t1s", 900)
    figure = picture_of([few, many])
    figure.draw_without_rendering()
    *axes, _ = [axis.get_position() for axis in figure.axes]
    for own in (axes[:2], axes[2:]):
        assert max(place.y1 for place in own) == pytest.approx(axes[0].y1, abs=0.01)
        assert min(place.y0 for place in own) == pytest.approx(axes[1].y0, abs=0.01)
        assert sum(place.height for place in own) > 0.75 * (axes[0].y1 - axes[1].y0)
    title = figure.axes[0].get_title(loc="left")
    assert "few\N{HYPHEN}pairs" in title, "in mathematics - is a minus sign"


@pytest.mark.parametrize("recipes", [["digits-2t1s"], ["digits-1t1s", "digits-2t1s"]])
def test_the_axes_of_the_same_runs_are_always_at_the_same_places(recipes: list[str]) -> None:
    runs = [record(recipe, 300, recipe) for recipe in recipes]
    places = set()
    for _ in range(12):
        figure = picture_of(runs)
        figure.draw_without_rendering()
        places.add(tuple(axis.get_position().bounds for axis in figure.axes))
    assert len(places) == 1


def luminance(colour: str) -> float:
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def test_marks_differ_in_grey() -> None:
    (paused, hatch, _), (not_better, other, _) = figures.AREAS
    assert luminance(not_better) - luminance(paused) > 0.2
    assert hatch != other
    figure = picture_of([record("digits-2t1s", 900)])
    gap, threshold = figure.axes[0].lines[:2]
    assert gap.get_linestyle() != threshold.get_linestyle()
    markers = [line.get_marker() for line in figure.axes[-1].lines if len(line.get_xdata())]  # type: ignore[arg-type]
    assert len(set(markers)) == 3


def test_fonts_are_embedded_and_the_same_run_gives_the_same_bytes(
    finished: Path, tmp_path: Path
) -> None:
    pdf = write_report([finished], tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType: type 42
    assert b"/Type3" not in pdf
    width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", pdf)[1])  # type: ignore[index]
    assert width == pytest.approx(72 * figures.COLUMN)
    assert b"/Subtype /Image" not in pdf  # vectors only
    assert write_report([finished], tmp_path / "b.pdf").read_bytes() == pdf
    svg = write_report([finished], tmp_path / "a.svg").read_text()
    assert "<image" not in svg
    assert write_report([finished], tmp_path / "b.svg").read_text() == svg


def test_groups_of_steps_keep_their_means_and_edges() -> None:
    steps = np.arange(5, 1008)
    bins = Bins.of(steps, 100)
    assert (bins.size, len(bins.starts)) == (11, 92)
    assert (bins.edges[0], bins.edges[-1]) == (4.5, 1007.5)
    assert bins.mean(steps)[0] == 10
    assert bins.mean(steps)[-1] == steps[1001:].mean()
    low, high = bins.range(steps)
    assert (low[1], high[1]) == (16, 26)


def test_a_long_run_is_a_small_picture() -> None:
    figure = picture_of([record("digits-2t1s", 500_000)])
    for axis in figure.axes:
        assert all(len(np.atleast_1d(line.get_xdata())) <= BINS for line in axis.lines)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    assert len(file.getvalue()) < 500_000


def test_a_gap_of_zero_and_a_single_step_can_be_drawn() -> None:
    run = record("digits-1t1s", 1)
    run.pairs[0].gap[:] = 0
    assert picture_of([run]).axes[0].get_yscale() == "linear"
    assert picture_of([replace(run, metrics=[])]).axes


def test_runs_without_a_step_have_no_picture() -> None:
    run = replace(record("digits-1t1s", 1, "empty"), pairs=[], metrics=[])
    with pytest.raises(UsageError, match="empty: no decision and no tested epoch yet"):
        picture_of([run])
