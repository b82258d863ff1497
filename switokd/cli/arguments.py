"""Arguments and help texts that several commands share, and how a command reports an error.

Imports neither torch nor the configuration, so that `switokd --help` answers at once.

Not covered: options that only one command has; they are in the module of that command.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, Optional

import typer

from switokd.errors import SwitokdError
from switokd.runtime.lifecycle import VERBOSE, print_error, told

EPILOG = (
    "Exit codes: 0 success, 2 a mistake in the run file, the arguments or the data, "
    "3 a network diverged, 4 a process of the run was lost, 6 a command has stopped the run, "
    "143 SIGTERM: the run can be continued."
)

_RUN_FILE = typer.Argument(
    metavar="RECIPE_OR_FILE", help="Name of a recipe (see 'switokd recipes'), or a run file."
)

RunFile = Annotated[str, _RUN_FILE]

OptionalRunFile = Annotated[Optional[str], _RUN_FILE]  # noqa: UP045

Settings = Annotated[
    Optional[list[str]],  # noqa: UP045, typer reads it at run time, on Python 3.10 as well
    typer.Argument(
        metavar="KEY.KEY=VALUE",
        help="Settings that replace those of the run file, such as schedule.epochs=3 or "
        "networks.student.model=wrn-16-1; see 'switokd settings'.",
    ),
]


MOST_DIGITS = 18
"""Of a whole number on the command line."""


def number_option(
    least: int, most: int | None = None, names: tuple[str, ...] = (), *, help: str
) -> Any:
    """Return an option for a whole number as it is written: 10 or 010, but not 1_0.

    names: of the option; by default, that of the parameter.
    """
    allowed = f"{least} or more" if most is None else f"{least} to {most}"

    def parse(text: object) -> int:
        if re.fullmatch(rf"[-+]?[0-9]{{1,{MOST_DIGITS}}}", str(text)):
            number = int(str(text))
            if number >= least and (most is None or number <= most):
                return number
        digits = f", with {MOST_DIGITS} digits at most" if len(str(text)) > MOST_DIGITS else ""
        raise typer.BadParameter(f"found {text}; allowed: a whole number, {allowed}{digits}")

    return typer.Option(*names, parser=parse, metavar="N", help=help)


def number_between(least: float, most: float) -> Callable[[object], float]:
    """Return what reads a number of an option or argument; "nan" is none."""

    def parse(text: object) -> float:
        try:
            number = float(str(text))
        except ValueError:
            number = math.nan
        if least <= number <= most:
            return number
        raise typer.BadParameter(f"found {text}; allowed: a number, {least:g} to {most:,g}")

    return parse


VERBOSE_HELP = "Show the frames of an error that a module of your own raises."


def _set_verbose(is_wanted: bool) -> None:
    if is_wanted:
        os.environ[VERBOSE] = "1"


Verbose = Annotated[
    bool, typer.Option("--verbose", callback=_set_verbose, expose_value=False, help=VERBOSE_HELP)
]


def fail(error: SwitokdError) -> NoReturn:
    """Print the error in one line and end the command with the error's exit code."""
    print_error(told(error))
    raise typer.Exit(error.exit_code)
