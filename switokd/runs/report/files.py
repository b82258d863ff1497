"""Writes a report: an HTML page, or the picture as SVG, PDF or PNG, by the file's name.

Not covered: the content (`page.py`, `figures.py`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from switokd.config.run_folders import config_file
from switokd.errors import Mistakes, UsageError
from switokd.runs.report.figures import STYLE, picture_of
from switokd.runs.report.page import page_of
from switokd.runs.report.record import RunRecord, read_runs
from switokd.runtime.durable import replace_file

FORMATS = (".html", ".png", ".svg", ".pdf")
DPI = 300
"""Of PNG; the other formats are vectors."""


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write a report on runs, and return its path.

    output: a file whose name ends in one of `FORMATS`, and which is replaced if it is there; None:
    report.html in the folder of the only run. UsageError if a folder holds no run, if `output` is
    missing or has another ending, or if it cannot be written.
    """
    mistakes = Mistakes()
    for folder in dict.fromkeys(folders):
        with mistakes.noted():
            config_file(folder)
    with mistakes.noted():
        _check_output(output, len(folders))
    mistakes.tell()
    output, runs = output or folders[0] / "report.html", read_runs(list(folders))
    kind = output.suffix.lower()
    content = page_of(runs).encode() if kind == ".html" else _picture(runs, kind[1:])
    try:
        replace_file(output, content)
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written: {error.strerror}") from None
    return output


def _check_output(output: Path | None, runs: int) -> None:
    """UsageError if the option --output is wrong, before anything is read or drawn."""
    if output is None:
        if runs > 1:
            raise UsageError("--output: name the file of a report on several runs: --output FILE")
    elif output.suffix.lower() not in FORMATS:
        raise UsageError(
            f"--output {output}: the format follows the file's name; allowed: FILE.html, FILE.png, "
            "FILE.svg, FILE.pdf"
        )
    elif not output.parent.is_dir():
        raise UsageError(
            f"--output {output}: there is no folder {output.parent}; make it, or name another"
        )


def _picture(runs: Sequence[RunRecord], kind: str) -> bytes:
    """Return the picture as the content of a file; the same runs give the same bytes."""
    from matplotlib import rc_context

    dates = {"pdf": {"CreationDate": None, "Creator": "switokd"}, "svg": {"Date": None}}
    file = io.BytesIO()
    with rc_context(STYLE):
        figure = picture_of(runs)
        figure.savefig(file, format=kind, dpi=DPI, metadata=dates.get(kind))
    return file.getvalue()
