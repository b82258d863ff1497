"""The documents' code, run as a reader would: every block, in order, in an empty folder."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import REPOSITORY, lines, run

CODE = {"python", "sh", "yaml"}

SESSION = """
import json, subprocess, sys
from pathlib import Path

sys.path.insert(0, "")  # as in an interactive session
names = {"__name__": "__main__"}
for language, line, code in json.loads(Path(sys.argv[1]).read_text()):
    first = code.partition("\\n")[0]
    if first.startswith("# ") and first.endswith((".py", ".yaml")):  # a file to be written
        Path(first[2:]).write_text(code)
    elif language == "sh":
        subprocess.run(["bash", "-euc", code], check=True)
    else:
        exec(compile("\\n" * line + code, sys.argv[2], "exec"), names)
"""


def blocks(document: Path) -> Iterator[tuple[str, int, str]]:
    """Language, line and text of each block of code."""
    text = document.read_text()
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in CODE:
            yield match[1], text.count("\n", 0, match.start(2)), match[2]


def session(document: str, folder: Path) -> str:
    """Run a document's blocks in one Python session and shells beside it; what they print."""
    path = REPOSITORY / "docs" / document
    here = folder / "work"
    here.mkdir()
    (folder / "blocks.json").write_text(json.dumps(list(blocks(path))))
    (folder / "session.py").write_text(SESSION)
    command = [sys.executable, str(folder / "session.py"), str(folder / "blocks.json"), str(path)]
    code, out, err = run(command, here, seconds=240)
    assert code == 0, f"{out}\n{err}"
    return out


@pytest.mark.timeout(250)
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    assert [language for language, _, _ in blocks(REPOSITORY / "docs" / "tutorial.md")] == [
        *("python", "python", "yaml", "sh"),
        *["python"] * 7,
    ]
    out = session("tutorial.md", tmp_path)
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
    assert f"small: {top1['mine-002']:.1f} % of the test images, paused in 0 of 176" in out
    assert re.search(r"^the teacher was paused at [1-9]\d* steps", out, re.MULTILINE)
    assert f"vanilla: student {top1['mine-003']:.1f} %" in out
    assert re.search(r"digit-6/\d+\.png is taken for digit-\d$", out, re.MULTILINE)


def test_the_reference_of_the_python_interface_holds(tmp_path: Path) -> None:
    session("python.md", tmp_path)
    assert {p.name for p in (tmp_path / "work" / "runs").iterdir()} == {
        "digits-1t1s-001",
        "distil-001",
    }
