"""The tutorial and the page on Python do what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.blocks import CODE, blocks, session
from tests.support import REPOSITORY, lines

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"


@pytest.mark.timeout(250)
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    assert [block.language for block in blocks(TUTORIAL) if block.language in CODE] == [
        *("python", "python", "yaml", "sh"),
        *["python"] * 7,
    ]
    out = session(TUTORIAL, tmp_path)
    work = tmp_path / "work"
    assert len(list(work.glob("images/*/*/*.png"))) == 1797
    top1 = {}
    for name in ("mine-001", "mine-002", "mine-003", "distil-001"):
        summary = json.loads((work / "runs" / name / "summary.json").read_text())
        top1[name] = summary["networks"]["small"]["top1_last"]
        assert summary["strategy"] == ("vanilla" if name == "mine-003" else "switokd")
    assert min(top1.values()) > 50, top1  # of ten classes: it has learned
    here, there = (lines(work / "runs" / f"mine-00{n}" / "decisions.jsonl") for n in (1, 2))
    assert [d["mode"] for d in here] == [d["mode"] for d in there]  # wherever the networks are
    assert [d["gap"] for d in here] == pytest.approx([d["gap"] for d in there], abs=0.02)
    assert "2 processes on cpu" in out  # by the command line
    assert "1 process on cpu, no coordinator" in out
    steps = 4 * (720 // 32)  # `run with` in the page: half the images
    paused = f"paused in 0 of {steps} steps"
    assert f"small: {top1['mine-002']:.1f} % of the test images, {paused}" in out
    assert re.search(r"^the teacher was paused at [1-9]\d* steps", out, re.MULTILINE)
    assert f"vanilla: student {top1['mine-003']:.1f} %" in out
    assert re.search(r"digit-6/\d+\.png is taken for digit-\d$", out, re.MULTILINE)


def test_the_reference_of_the_python_interface_holds(tmp_path: Path) -> None:
    session(REPOSITORY / "docs" / "python.md", tmp_path)
    assert {p.name for p in (tmp_path / "work" / "runs").iterdir()} == {
        "digits-1t1s-001",
        "distil-001",
    }
