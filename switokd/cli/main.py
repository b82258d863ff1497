"""The command `switokd`: registers its subcommands.

The subcommands' modules import what they need when they run. `switokd --help` therefore imports
neither torch nor the configuration.

Not covered: what a subcommand does (the module of its name).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from switokd.cli.arguments import EPILOG
from switokd.cli.check import check
from switokd.cli.compare import compare
from switokd.cli.coordinator import coordinator
from switokd.cli.export import export, predict
from switokd.cli.networks import networks
from switokd.cli.plan import plan
from switokd.cli.settings import recipes, settings
from switokd.cli.train import train
from switokd.errors import UsageError
from switokd.runtime.lifecycle import print_error
from switokd.runtime.threads import wait_briefly

LEFT_OUT = ("torch", "torchvision", "numpy", "matplotlib", "yaml", "joblib", "PIL", "sklearn")
"""Dependencies of training, which the distribution switokd-coordinator does not install."""

app = typer.Typer(
    help="Train networks that teach each other: switchable online knowledge distillation.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_WITH_EXIT_CODES: list[Callable[..., None]] = [train, plan, check, compare, export, predict]
for _command in _WITH_EXIT_CODES:
    app.command(epilog=EPILOG)(_command)
_OTHERS: list[Callable[..., None]] = [networks, coordinator, recipes, settings]
for _command in _OTHERS:
    app.command()(_command)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from switokd import __version__

        print(f"switokd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command `switokd`."""
    wait_briefly()
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name not in LEFT_OUT:
            raise
        print_error(
            f"this command needs {error.name}, which switokd-coordinator leaves out; "
            "pip uninstall switokd-coordinator, then pip install switokd"
        )
        raise SystemExit(UsageError.exit_code) from None
