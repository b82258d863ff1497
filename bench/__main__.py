"""`python -m bench`: all figures, a table of them, and bench/results.json.

Not covered: a machine that others use meanwhile; its load is in the results, and is warned of.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.figures import Figure, Say

PARTS = {
    "plain": "against",
    "roofline": "roofline",
    "waits": "waits",
    "paused": "pausing",
    "input": "loading",
    "simulated": "placements",
    "coordinator": "",
    "gpu": "gpu",
}
"""Each part's module, which has `measure(quick, say)`; the coordinator's is of its own kind."""
FIGURES = {
    "plain": ("plain_fp32", "plain_bf16", "unequal_fp32"),
    "waits": ("decision_wait_share", "decision_wait_over_round_trip"),
    "paused": ("paused_over_learning",),
    "input": ("input_over_training",),
    "simulated": ("simulated_efficiency", "plan_error"),
    "coordinator": ("coordinator_reports_per_second", "coordinator_p99_ms"),
}
"""By which a part can be asked for as well."""


def main() -> int:
    """Measure what is asked for; 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and rounds: does it run?")
    parser.add_argument("--only", metavar="NAME[,NAME]", default="", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=machine.REPOSITORY / "bench" / "results.json")
    options = parser.parse_args()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    try:
        parts = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(machine.cores())  # whatever OMP_NUM_THREADS says to others
    results: dict[str, Any] = {**machine.describe(), "quick": options.quick}
    load = results["hardware"]["load_1_minute"]
    if load > 0.5:
        console.print(f"[yellow]others use this machine (load {load:.1f}): figures will be off")
    figures: list[Figure] = []
    failed: dict[str, str] = {}
    for part in parts:
        started = time.monotonic()
        try:
            for figure in measure(part, options.quick, lambda text: console.print(f"  {text}")):
                figures.append(figure)
                console.print(f"{figure.name} {figure.value:.3g}")
        except Exception as error:  # one part's fault is not the others'
            failed[part] = str(error) or type(error).__name__
            console.print(traceback.format_exc(), markup=False)
        console.print(f"[bold]{part}[/] took {time.monotonic() - started:.0f} s")
        results |= {"figures": {f.name: f.record() for f in figures}, "failed": failed}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(figures))
    for rows in (f for f in figures if "rows" in f.details):
        console.print(scaling(rows))
    console.print(f"written to {options.out}", markup=False)
    return bool(failed)


def chosen(only: str) -> list[str]:
    """Give the parts to measure; ValueError for a name that is neither part nor figure."""
    owners = {name: part for part, names in FIGURES.items() for name in names}
    wanted = [owners.get(name, name) for name in only.split(",") if name]
    for name in wanted:
        if name not in PARTS:
            raise ValueError(f"--only {name}: one of {', '.join([*PARTS, *owners])}")
    return [part for part in PARTS if part in wanted or not wanted]


def measure(part: str, quick: bool, say: Say) -> Iterable[Figure]:
    """Give one part's figures, each as soon as it is there."""
    if part != "coordinator":
        found: Iterable[Figure] = importlib.import_module(f"bench.{PARTS[part]}").measure(
            quick, say
        )
        return found
    say("the coordinator under load")
    return _coordinator(quick)


def _coordinator(quick: bool) -> list[Figure]:
    from bench import coordinator

    found = [coordinator.measure(quick)] + [coordinator.measure_main(quick) for _ in range(2)]
    per_second, p99 = "coordinator_reports_per_second", "coordinator_p99_ms"
    return [
        Figure(
            per_second,
            tuple(each[per_second] for each in found),
            target=float(coordinator.TARGET_PER_SECOND),
            what="reports that one coordinator on one core takes, 64 ranks",
            details=found[0],
        ),
        Figure(
            p99,
            tuple(each[p99] for each in found),
            target=10.0,
            at_least=False,
            what="milliseconds from a report to its decision, 99th percentile, meanwhile",
        ),
    ]


def table(figures: Iterable[Figure]) -> Table:
    """Every figure in a line."""
    made = Table(title="figures (simulated ones are of waits, not of compute)")
    for heading in ("name", "value", "target", "reached", "spread"):
        made.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=True)
    made.add_column("what")
    for f in figures:
        target = "-" if f.target is None else f"{'>=' if f.at_least else '<='} {f.target:g}"
        made.add_row(
            f.name + (" (simulated)" if f.simulation else ""),
            f"{f.value:.3g}",
            target,
            {None: "-", True: "[green]yes", False: "[red]no"}[f.reached],
            f"{min(f.rounds):.3g} to {max(f.rounds):.3g}",
            f.what,
        )
    return made


def scaling(figure: Figure) -> Table:
    """Steps by number of devices."""
    made = Table(title=f"{figure.name} (simulation)")
    rows = figure.details["rows"]
    for heading in rows[0]:
        made.add_column(heading.replace("_", " "))
    for row in rows:
        made.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    return made


if __name__ == "__main__":
    raise SystemExit(main())
