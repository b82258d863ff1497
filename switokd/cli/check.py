"""The command `switokd check`: a dry run of recipes and run files, before any data or GPU is there.

Torch is imported only once a run file has been read.

Not covered: the dry run itself (`dry_run.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from switokd.config.config import Config
from switokd.config.recipes import recipes
from switokd.config.run_file import load_importable
from switokd.data.catalog import DOWNLOADABLE, known
from switokd.errors import SwitokdError, UsageError

if TYPE_CHECKING:
    from switokd.planning.dry_run import DryRun

WIDTH = 100
"""Characters of the table where there is no terminal."""

WORDS_HELP = "Recipes or run files, and settings on top of them, such as data.batch_size=256."
ALL_HELP = "All recipes that ship with switokd."
BATCH_HELP = "Images of the step; their shape is the data's in any case."


def check(
    words: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Argument(metavar="RECIPE_OR_FILE|KEY.KEY=VALUE", help=WORDS_HELP),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help=ALL_HELP)] = False,
    batch: Annotated[int, typer.Option(min=2, help=BATCH_HELP)] = 4,
) -> None:
    """Check that run files train: builds their networks, and makes one step on noise.

    The data need not be there, unless they are your own: then their own images are used.
    Prints what was built and what the run would need. For example:

    switokd check mine.yaml networks.student.model=wrn-16-1

    switokd check --all
    """
    settings = [word for word in words or [] if "=" in word]
    names = [word for word in words or [] if "=" not in word]
    if every:
        names = [*recipes(), *(name for name in names if name not in recipes())]
    if not names:
        _fail(UsageError("check: name a recipe (see 'switokd recipes') or a run file, or --all"))
    failed = 0
    for name in names:
        problems = _check(name, settings, batch)
        for problem in problems:
            print(f"switokd: {' '.join(problem.split())}", file=sys.stderr, flush=True)
        failed += bool(problems)
    if len(names) > 1:
        passed = f"{len(names) - failed} of {len(names)}" if failed else f"all {len(names)}"
        print(f"{passed} run files pass")
    if failed:
        raise typer.Exit(UsageError.exit_code)


def _check(name: str, settings: list[str], batch: int) -> tuple[str, ...]:
    """Check one and print what was found; its problems, a line each."""
    try:
        config = load_importable(name, settings)
    except SwitokdError as error:  # names the file already
        return (str(error),)
    from switokd.planning.dry_run import dry_run

    found = dry_run(config, batch)
    if not found.problems:
        _print(config, found)
    return tuple(f"{name}: {problem}" for problem in found.problems)


def _print(config: Config, found: DryRun) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    title = f"{config.name}: {config.topology.name}, {config.distillation.strategy}"
    table = Table(title=title)
    table.add_column("network", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("model", overflow="fold")
    for heading in ("parameters", "output", "loss", "seconds", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(
            row.name,
            row.role,
            row.model,
            f"{row.parameters:,}",
            " x ".join(str(n) for n in row.output),
            "frozen" if row.loss != row.loss else f"{row.loss:.3f}",
            f"{row.seconds:.2f}",
            _bytes(row.memory_bytes),
        )
    console.print(table, soft_wrap=False)
    for line in _needs(config, found):
        console.print(line, markup=False)


def _needs(config: Config, found: DryRun) -> list[str]:
    """What was stepped on, and what the run needs: a line each."""
    assert found.images is not None
    shape = " x ".join(str(n) for n in found.images.shape)
    kind = "images of noise" if known(config.data) else "of its own images"
    lines = [
        f"one step  {found.batch} {kind}, {shape}, {found.images.classes} classes, on "
        f"{found.device}; memory is an estimate, of each network on a rank, for batches of "
        f"{config.data.batch_size}",
        f"data      {_data(config)}",
    ]
    if config.world_size:
        lines.append(f"ranks     {config.world_size}: {config.placement_on(config.world_size)}")
    else:
        lines.append(f"ranks     any number (placement: {config.placement})")
    schedule, per_epoch = config.schedule, found.images.steps_per_epoch
    steps = schedule.epochs * per_epoch
    lines.append(
        f"steps     {min(steps, schedule.max_steps or steps):,}: {schedule.epochs} epochs of "
        f"{per_epoch:,}"
    )
    return lines


def _data(config: Config) -> str:
    """What data.root must hold, and whether it does."""
    data, here = config.data, known(config.data)
    if here is None:
        return f"{data.dataset}, found"
    if not here.folders:
        return f"{data.dataset}, installed with switokd"
    root = Path(data.root)
    paths = [root if root.resolve().name == each else root / each for each in here.folders]
    missing = [str(path) for path in paths if not path.is_dir()]
    if not missing:
        return f"{data.dataset}, found in {data.root}"
    remedy = "; data.download=true fetches it" if data.dataset in DOWNLOADABLE else ""
    remedy = "; the run will download it" if remedy and data.download else remedy
    return f"{data.dataset}, not here yet: needs {', '.join(missing)}{remedy}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _fail(error: SwitokdError) -> None:
    print(f"switokd: {error}", file=sys.stderr)
    raise typer.Exit(error.exit_code)
