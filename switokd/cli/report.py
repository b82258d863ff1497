"""The command `switokd report`.

Not covered: the report itself (`runs/report/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from switokd.cli.arguments import fail
from switokd.errors import SwitokdError

RUNS_HELP = "Folders of runs, also of runs that still go on or have failed."
OUTPUT_HELP = (
    "File to write: FILE.html is the whole report; FILE.pdf, FILE.svg and FILE.png are the picture "
    "alone, for a paper. Default: report.html in the run folder, if there is one run."
)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help=RUNS_HELP)],
    output: Annotated[
        Optional[Path],  # noqa: UP045, typer reads it at run time
        typer.Option("--output", "-o", metavar="FILE", help=OUTPUT_HELP),
    ] = None,
) -> None:
    """Write a report on one or several runs: one HTML file, or a picture for a paper.

    For example:

    switokd report runs/digits-2t1s-001

    switokd report runs/first runs/second --output both.html

    switokd report runs/first --output figure.pdf

    The page shows accuracies, gap, threshold and modes of each pair, time and compute, events, and
    the settings that differ from their defaults and between the runs. It needs no other file and
    no network. The picture is as wide as a column of a paper; with several runs, as two.
    """
    from switokd.runs.report.files import write_report

    try:
        print(write_report(runs, output))
    except SwitokdError as error:
        fail(error)
