"""Arguments and help texts that several commands share, and how a command reports an error.

Imports neither torch nor the configuration, so that `switokd --help` answers at once.

Not covered: options that only one command has; they are in the module of that command.
"""

from __future__ import annotations

from typing import Annotated, NoReturn, Optional

import typer

from switokd.errors import SwitokdError
from switokd.runtime.lifecycle import print_error

EPILOG = (
    "Exit codes: 0 success, 2 a mistake in the run file, the arguments or the data, "
    "3 a network diverged, 4 a process of the run was lost, 143 SIGTERM: the run can be continued."
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


def fail(error: SwitokdError) -> NoReturn:
    """Print the error in one line and end the command with the error's exit code."""
    print_error(str(error))
    raise typer.Exit(error.exit_code)
