"""`python -m bench`: measure all figures, print them as a table, write bench/results.json.

Not covered: keeping other processes off the machine; their CPU time is measured and reported.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table

from bench import (
    against,
    bursts,
    busy,
    coordinator,
    gpu,
    loading,
    machine,
    nccl,
    pausing,
    placements,
    planning,
    profiling,
    roofline,
    scale,
    starting,
    waits,
)
from bench.figures import Figure
from bench.results import Results
from switokd.errors import nearest
from switokd.runtime.environment import cores
from switokd.runtime.threads import wait_briefly

PARTS: Mapping[str, ModuleType] = {
    "plain": against,
    "roofline": roofline,
    "profile": profiling,
    "waits": waits,
    "paused": pausing,
    "input": loading,
    "simulated": placements,
    "planning": planning,
    "coordinator": coordinator,
    "scale": scale,
    "bursts": bursts,
    "busy": busy,
    "start": starting,
    "gpu": gpu,
    "nccl": nccl,
}
"""Parts of the benchmark. Each module has `measure(quick, say)` and the names in `FIGURES`."""
BUSY_SHARE = 0.05
"""Share of the cores, taken by other processes, above which a figure is unreliable."""


def main() -> int:
    """Measure the chosen parts; returns 1 if a part failed, exits with 2 for wrong options."""
    options, parser = _options()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    try:
        parts = chosen(options.only)
        results = Results(options.out, options.quick, options.merge)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    wait_briefly()  # child processes inherit this, on both sides of a ratio
    torch.set_num_threads(cores())  # independent of OMP_NUM_THREADS
    others = machine.Others()
    time.sleep(1)  # a short look at the load; each figure is watched on its own later
    if (share := others.share() or 0.0) > BUSY_SHARE:
        console.print(f"[yellow]other processes use {share:.0%} of this machine now")
    figures: list[Figure] = []
    for part in parts:
        started = time.monotonic()
        measured = PARTS[part].measure(options.quick, lambda text: console.print(f"  {text}"))
        try:
            for figure in results.add(part, measured):
                figures.append(figure)
                taken = _others(results.taken[figure.name])
                console.print(f"{figure.name} {figure.value:.3g}  [dim]others took {taken}")
        except Exception as error:  # the other parts go on
            results.fail(part, str(error) or type(error).__name__)
            console.print(traceback.format_exc(), markup=False)
        console.print(f"[bold]{part}[/] took {time.monotonic() - started:.0f} s")
    console.print(table(figures, results.taken))
    for figure in (f for f in figures if "rows" in f.details):
        console.print(rows(figure))
    console.print(f"written to {options.out}", markup=False)
    return bool(results.failed)


def _options() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few steps and rounds, to see whether everything runs"
    )
    parser.add_argument("--only", metavar="NAME[,NAME]", default="", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=machine.REPOSITORY / "bench" / "results.json")
    parser.add_argument(
        "--merge", action="store_true", help="keep the figures of other parts in the file --out"
    )
    return parser.parse_args(), parser


def chosen(only: str) -> list[str]:
    """Parts to measure, from names of parts and figures. ValueError for an unknown name."""
    owners = {name: part for part, module in PARTS.items() for name in module.FIGURES}
    wanted = [owners.get(name, name) for name in only.split(",") if name]
    for name in wanted:
        if name not in PARTS:
            hint = nearest(name, [*PARTS, *owners])
            raise ValueError(f"--only {name}: allowed are {', '.join(PARTS)}, or a figure{hint}")
    return [part for part in PARTS if part in wanted or not wanted]


def table(figures: Iterable[Figure], taken: Mapping[str, float | None]) -> Table:
    """One line per figure, with the share of the cores that other processes took meanwhile."""
    result = Table(title="figures (simulated: networks that wait instead of computing)")
    for heading in ("name", "value", "target", "reached", "spread", "others"):
        result.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=True)
    result.add_column("what")
    for f in figures:
        target = "-" if f.target is None else f"{'>=' if f.at_least else '<='} {f.target:g}"
        result.add_row(
            f.name + (" (simulated)" if f.simulation else ""),
            f"{f.value:.3g}",
            target,
            {None: "-", True: "[green]yes", False: "[red]no"}[f.reached],
            f"{min(f.rounds):.3g} to {max(f.rounds):.3g}",
            _others(taken[f.name]),
            f.what,
        )
    return result


def _others(share: float | None) -> str:
    if share is None:
        return "?"
    return f"[yellow]{share:.0%}[/]" if share > BUSY_SHARE else f"{share:.0%}"


def rows(figure: Figure) -> Table:
    """Table of a figure's details, for example step times by number of devices."""
    result = Table(title=figure.name + (" (simulation)" if figure.simulation else ""))
    lines = figure.details["rows"]
    for heading in lines[0]:
        result.add_column(heading.replace("_", " "))
    for line in lines:
        result.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in line.values()))
    return result


if __name__ == "__main__":
    raise SystemExit(main())
