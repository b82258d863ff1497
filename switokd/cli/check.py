"""The command `switokd check`: a dry run of recipes and run files, without data or GPU.

Torch is imported only after a run file has been read.

Not covered: the dry run itself (`planning/dry_run.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from switokd.cli.arguments import Verbose, fail, number_option
from switokd.config.recipes import recipes
from switokd.errors import SwitokdError, UsageError
from switokd.runtime.lifecycle import print_error, told

if TYPE_CHECKING:
    from switokd.config.config import Config
    from switokd.planning.dry_run import DryRun

WIDTH = 100
"""Width of the table in characters where output is no terminal."""

WORDS_HELP = "Recipes or run files, and settings that replace theirs, such as data.batch_size=256."
ALL_HELP = "Check all recipes that ship with switokd."
BATCH_HELP = "Images of the training step. They have the full image shape of the data set."


def check(
    words: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Argument(metavar="RECIPE_OR_FILE|KEY.KEY=VALUE", help=WORDS_HELP),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help=ALL_HELP)] = False,
    batch: Annotated[int, number_option(2, help=BATCH_HELP)] = 4,
    verbose: Verbose = False,
) -> None:
    """Check that run files can train: build the networks and make one training step.

    For example:

    switokd check mine.yaml networks.student.model=wrn-16-1

    switokd check --all

    The step uses random images, so that the data set need not be downloaded; only a
    data set of your own is opened. Prints a table of the networks (parameters,
    seconds, memory) and what the run needs: data, ranks, steps. Writes nothing.
    """
    settings = [word for word in words or [] if "=" in word]
    names = [word for word in words or [] if "=" not in word]
    if every:
        names = [*recipes(), *(name for name in names if name not in recipes())]
    if not names:
        fail(UsageError("check: name a recipe (see 'switokd recipes') or a run file, or --all"))
    failed = 0
    for name in names:
        problems = _check(name, settings, batch)
        for problem in problems:
            print_error(problem)
        failed += bool(problems)
    if len(names) > 1:
        passed = f"{len(names) - failed} of {len(names)}" if failed else f"all {len(names)}"
        print(f"{passed} run files pass")
    if failed:
        raise typer.Exit(UsageError.exit_code)


def _check(name: str, settings: list[str], batch: int) -> tuple[str, ...]:
    """Check one run file and print the result; return its problems, one sentence each."""
    from switokd.config.run_file import load_importable

    try:
        config = load_importable(name, settings)
    except SwitokdError as error:  # its message names the file
        return tuple(told(error).splitlines())
    from switokd.planning.dry_run import dry_run

    result = dry_run(config, batch)
    if not result.problems:
        _print(config, result)
    return tuple(" ".join(f"{name}: {problem}".split()) for problem in result.problems)


def _print(config: Config, result: DryRun) -> None:
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
    for row in result.networks:
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
    for line in _needs(config, result):
        console.print(line, markup=False)


def _needs(config: Config, result: DryRun) -> list[str]:
    """Describe the step that was made, and the data, ranks and steps that the run needs."""
    from switokd.data.catalog import known

    assert result.images is not None
    shape = " x ".join(str(n) for n in result.images.shape)
    kind = "random images" if known(config.data) else "images of the data set"
    lines = [
        f"one step  {result.batch} {kind}, {shape}, {result.images.classes} classes, on "
        f"{result.device}; memory is an estimate per network and rank for batches of "
        f"{config.data.batch_size}",
        f"data      {_data(config)}",
    ]
    if config.world_size:
        lines.append(f"ranks     {config.world_size}: {config.placement_on(config.world_size)}")
    else:
        lines.append(f"ranks     any number (placement: {config.placement})")
    schedule, per_epoch = config.schedule, result.images.steps_per_epoch
    steps = schedule.epochs * per_epoch
    lines.append(
        f"steps     {min(steps, schedule.max_steps or steps):,}: {schedule.epochs} epochs of "
        f"{per_epoch:,}"
    )
    return lines


def _data(config: Config) -> str:
    """Describe the data set, where it must be, and whether it is there."""
    from switokd.data.catalog import DOWNLOADABLE, known, missing_folders

    data, catalogued = config.data, known(config.data)
    if catalogued is None:
        return f"{data.dataset}, opened"
    if not catalogued.folders:
        return f"{data.dataset}, installed with switokd"
    missing = [str(path) for path in missing_folders(data)]
    if not missing:
        return f"{data.dataset}, present in {data.root}"
    remedy = "; data.download=true downloads it" if data.dataset in DOWNLOADABLE else ""
    remedy = "; the run will download it" if remedy and data.download else remedy
    return f"{data.dataset}, not present: {', '.join(missing)}{remedy}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
